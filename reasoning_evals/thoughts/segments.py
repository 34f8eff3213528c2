"""A thought cut into its successive attempts, at sentences that begin with a switch marker such as "wait"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

SWITCH_MARKERS = (
    "alternatively", "wait", "but wait", "hmm", "hold on", "actually", "let me check", "let me recheck", "let me double-check",
    "let me double check", "let me verify", "let me try", "let me reconsider", "let me re-check", "let me re-examine",
    "another way", "another approach", "another method", "on second thought",
)  # fmt: skip
"""Sentence openings that begin a new attempt or a check (the marker words of arXiv 2501.18585 and 2412.21187, widened)."""
MIN_CHARS = 20
"""Shorter pieces are joined with the next one: "Wait, wait." begins one attempt."""
_SENTENCE_START = r"(?:^|(?<=[.!?\n])|(?<=[.!?][\"')\]]))\s*(?:\*\*|- |\d+[.)] )?"


class Segment(NamedTuple):
    """``text`` is ``thought[start:end]``; segments cover the thought without gaps."""

    start: int
    end: int
    text: str


def segment_thought(
    thought: str, markers: Sequence[str] = SWITCH_MARKERS, min_chars: int = MIN_CHARS
) -> tuple[Segment, ...]:
    """Cut before every sentence that begins with a marker (any case, at a word's end).

    >>> [segment.text for segment in segment_thought("3 + 4 is 8, I would say. Wait, that is wrong: it is 7.")]
    ['3 + 4 is 8, I would say.', ' Wait, that is wrong: it is 7.']
    """
    if not thought.strip():
        return ()
    cuts = [match.start() for match in _openings(tuple(markers)).finditer(thought)]
    bounds = [0]
    for cut in cuts:
        if len(thought[bounds[-1] : cut].strip()) >= min_chars:
            bounds.append(cut)
    ends = [*bounds[1:], len(thought)]
    return tuple(Segment(start, end, thought[start:end]) for start, end in zip(bounds, ends, strict=True))


@lru_cache(maxsize=64)
def _openings(markers: tuple[str, ...]) -> re.Pattern[str]:
    if not markers or not all(marker.strip() for marker in markers):
        raise ValueError(f"markers are {markers!r}: expected words that begin a new attempt, none of them empty")
    longest_first = sorted(markers, key=len, reverse=True)
    words = "|".join(re.escape(marker.strip()).replace(r"\ ", r"\s+") for marker in longest_first)
    return re.compile(rf"{_SENTENCE_START}(?:{words})(?!\w)", re.IGNORECASE)
