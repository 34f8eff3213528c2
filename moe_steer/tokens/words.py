"""Whole words in tokens: which tokens continue a word, so that "Wait" is not found in "Waiting" or "await"."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import numpy as np

_LETTERS = frozenset(string.ascii_letters)
_SPACES = str.maketrans(
    {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}
)  # the characters with which vocabularies write white space


@dataclass(frozen=True, kw_only=True, slots=True)
class WordEdges:
    """Tokens that continue a word and tokens that can be continued, so that "Wait" is not found in "Waiting" or "await"."""

    starts_with_letter: frozenset[int]
    """Tokens that join the token before them without a space, letter to letter."""
    ends_with_letter: frozenset[int]


def word_edges(tokenizer: Any) -> WordEdges | None:
    """Which tokens continue a word; None for a tokenizer whose tokens are always whole words."""
    texts = {token_id: token.translate(_SPACES) for token, token_id in tokenizer.get_vocab().items() if token}
    words = sorted((token_id, text) for token_id, text in texts.items() if set(text) <= _LETTERS)
    if words and not _joins(tokenizer, *words[0]):
        # Tokens are separated on decoding (WordPiece, word-level): only the marked continuations join a word.
        starts = {token_id for token_id, text in texts.items() if text[:2] == "##" and text[2:3] in _LETTERS}
    else:
        starts = {token_id for token_id, text in texts.items() if text[0] in _LETTERS}
    ends = {token_id for token_id, text in texts.items() if text[-1] in _LETTERS}
    return WordEdges(starts_with_letter=frozenset(starts), ends_with_letter=frozenset(ends)) if starts else None


def inside_a_word(ids_T: np.ndarray[Any, Any], start: int, stop: int, edges: WordEdges | None) -> bool:
    if edges is None:
        return False
    joined_left = start > 0 and _joined(int(ids_T[start - 1]), int(ids_T[start]), edges)
    joined_right = stop < len(ids_T) and _joined(int(ids_T[stop - 1]), int(ids_T[stop]), edges)
    return joined_left or joined_right


def _joined(left: int, right: int, edges: WordEdges) -> bool:
    return left in edges.ends_with_letter and right in edges.starts_with_letter


def _joins(tokenizer: Any, token_id: int, text: str) -> bool:
    pair = tokenizer.decode([token_id, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text + text in pair
