"""Fluency as n-gram entropy: a text that repeats itself has little of it. Pure.

The measure of the knowledge-editing papers (ROME, arXiv 2202.05262; SafeEdit, arXiv 2403.14472): the mean of (2/3) H2 and
(4/3) H3, where Hn is the entropy in bits of the text's n-grams. It grows with the length of a text, so it compares arms of
equal token limit and nothing else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


def n_gram_entropy(tokens: Sequence[Hashable]) -> float:
    """((2/3) H2 + (4/3) H3) / 2 in bits; a text too short for an n-gram has entropy 0 there.

    >>> round(n_gram_entropy("a b c d".split()), 4)
    1.195
    >>> n_gram_entropy(["a"])
    0.0
    """
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


def text_fluency(text: str) -> float:
    """``n_gram_entropy`` over words and punctuation marks.

    The papers split with NLTK's tokenizer; this split is simpler, so the last digits differ from theirs (it does not cut
    "don't" in two).
    """
    return n_gram_entropy(_WORD.findall(text))


def _entropy(tokens: Sequence[Hashable], n: int) -> float:
    counts = Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return sum(-count / total * math.log2(count / total) for count in counts.values()) if len(counts) > 1 else 0.0
