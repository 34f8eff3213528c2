"""A thought cut into attempts: at sentences that begin a new attempt or a check, and where a second solution begins without saying so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

SWITCH_MARKERS = (
    "alternatively", "wait", "but wait", "hmm", "hold on", "actually", "let me check", "let me recheck", "let me double-check",
    "let me double check", "let me verify", "let me try", "let me reconsider", "let me re-check", "let me re-examine",
    "let me make sure", "let me redo", "let me think again", "let's check", "let's recheck", "let's double-check",
    "let's double check", "let's verify", "let's try", "i should check", "i should double-check", "i should verify",
    "i'll double-check", "i'll verify", "double-checking", "to double-check", "to verify", "to be sure", "just to be sure",
    "another way", "another approach", "another method", "a second way", "second way", "a second method", "second method",
    "method 2", "approach 2", "we can also", "we could also", "one can also", "or we could", "on second thought",
)  # fmt: skip
"""Sentence openings that begin a new attempt or a check (the marker words of arXiv 2501.18585 and 2412.21187, widened)."""
MIN_CHARS = 20
"""Shorter pieces that say no number or formula are joined with the next one: "Wait, wait." begins one attempt."""
_SENTENCE_START = r"(?:^|(?<=[.!?\n])|(?<=[.!?][\"')\]]))\s*(?:\*\*|[*_]|- |\d+[.)] )?"
_INTERJECTION = r"(?:(?:oh|ah|okay|ok|no|so|and|well|hey|yes|yeah|but|um|uh)\b(?:\s+no)?[,.!…]*\s+){0,2}"
_ADVERB = r"(?:[*_]{0,2}(?:just|quickly|also|now|first|really|carefully|briefly|simply|still)[*_]{0,2}\s+){0,2}"
_SAYS_SOMETHING = re.compile(r"\d|=|\([A-J]\)")
_CALCULATION = re.compile(r"\d\s*[-+*/×·^=]|=")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_SUMMARY = re.compile(
    r"\s*(?:\*\*)?(?:so|thus|therefore|hence|final|the (?:final )?answer|that's|that is|i'?m |i am |answer|done|in conclusion|in summary|"
    r"finally|which|\\boxed|\$*\\boxed)",
    re.IGNORECASE,
)


class Segment(NamedTuple):
    """``text`` is ``thought[start:end]``; segments cover the thought without gaps."""

    start: int
    end: int
    text: str


def segment_thought(thought: str, markers: Sequence[str] = SWITCH_MARKERS) -> tuple[Segment, ...]:
    """Cut before every sentence that begins with a marker (any case, at a word's end), also after an interjection and with an adverb
    inside: "Oh wait", "Let me *just* double-check".

    >>> [segment.text for segment in segment_thought("3 + 4 = 8. Oh wait, that is wrong: it is 7.")]
    ['3 + 4 = 8.', ' Oh wait, that is wrong: it is 7.']
    """
    if not thought.strip():
        return ()
    cuts = [match.start() for match in _openings(tuple(markers)).finditer(thought)]
    bounds = [0]
    for cut in cuts:
        piece = thought[bounds[-1] : cut].strip()
        if len(piece) >= MIN_CHARS or _SAYS_SOMETHING.search(piece):
            bounds.append(cut)
    return _between(thought, bounds)


def cut_second_solutions(
    thought: str,
    segments: Sequence[Segment],
    states: Callable[[str], Sequence[tuple[int, str]]],
    concludes: Callable[[str], bool],
) -> tuple[Segment, ...]:
    """Cut segments where a second solution begins without a marker: after a sentence that gives the answer (``concludes``: a box, "answer
    is"), or after a paragraph whose last answer is stated again later; if what follows is a calculation, and no summary, that states
    an answer. ``states``: places and answers of a text, in order."""
    bounds: list[int] = []
    for start, _, text in segments:
        bounds.append(start)
        stated = states(text)
        done = 0
        for match in _SENTENCE_END.finditer(text) if len(stated) > 1 else ():
            cut = match.end()
            before = [answer for at, answer in stated if done <= at < cut]
            after = [answer for at, answer in stated if at >= cut]
            if not before or not after or len(text) - cut < MIN_CHARS or _SUMMARY.match(text, cut):
                continue
            sentence = text[max(done, text.rfind("\n", 0, match.start()) + 1) : cut]
            again = text.startswith("\n", cut) and before[-1] in after
            if (again or concludes(sentence)) and _CALCULATION.search(text, cut):
                bounds.append(start + cut)
                done = cut
    return _between(thought, bounds) if bounds else ()


def _between(thought: str, bounds: Sequence[int]) -> tuple[Segment, ...]:
    ends = [*bounds[1:], len(thought)]
    return tuple(Segment(start, end, thought[start:end]) for start, end in zip(bounds, ends, strict=True))


@lru_cache(maxsize=64)
def _openings(markers: tuple[str, ...]) -> re.Pattern[str]:
    if not markers or not all(marker.strip() for marker in markers):
        raise ValueError(f"markers are {markers!r}: expected words that begin a new attempt, none of them empty")
    longest_first = sorted(markers, key=len, reverse=True)
    words = "|".join(re.escape(marker.strip()).replace(r"\ ", r"\s+" + _ADVERB) for marker in longest_first)
    return re.compile(rf"{_SENTENCE_START}{_INTERJECTION}(?:{words})(?!\w)", re.IGNORECASE)
