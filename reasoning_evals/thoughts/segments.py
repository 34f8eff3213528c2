"""What a thought consists of: attempts (at sentences that begin a new one or a check, and where a second solution begins without saying so), and the
answers that a piece states (boxes, "answer is X", results at the end of a clause, option letters)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from reasoning_evals.grading.records import boxes

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
) -> tuple[Segment, ...]:
    """Cut segments where a second solution begins without a marker: after a sentence that gives the answer (a box, "answer
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


MAX_CANDIDATES = 20
"""Answers that are judged in one segment: the last ones."""

_STATED = re.compile(r"\banswer(?:\s+\w+){0,3}?\s*(?:is|=|:)\s*([^\n.;]{1,60}(?:\.\d+[^\n.;]{0,30})?)", re.IGNORECASE)
_NUMBER = r"-?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\\frac\{\d+\}\{\d+\})(?:/\d+)?"
_CLAUSE_END = r"\s*(?:\$|\\\)|\\\])?\s*(?=[.,;!?]?\s*(?:\n|$)|[.,;!?]\s)"
_EQUALS = re.compile(rf"(?:=|\\approx|≈)\s*({_NUMBER}[^\n.,;=]{{0,20}}?){_CLAUSE_END}")
_RESULT = re.compile(
    r"\b(?:(?:gives?|gets?|got|gave|yields?|makes?|leaves?|totals?|equals?|(?:should|must|would|will|has to|have to) be|"
    r"comes? (?:out )?(?:to|at|as)|(?:is|be) equal to|(?:result|total|sum|product|difference|quotient|value) is|that's|that is|it's|it is)"
    r"(?:\s+(?:us|me|you|him|her|them|a total of|exactly|just|only|indeed|still|again))*|(?:so|thus|hence|therefore),?(?:\s+(?:it's|it is|we get))?)\s+"
    rf"((?:\$|\\\()?{_NUMBER}(?:\s+[A-Za-z°%/²³]+){{0,2}}){_CLAUSE_END}",
    re.IGNORECASE,
)
"""Results in words: "gives us 7 apples", "should be 7", "so 7."."""
_OPTION = re.compile(r"\b(?:option|choice)\s+\(?([A-J])\)?(?!\w)|\(([A-J])\)")
_SENTENCE = re.compile(r"[^\n.!?]+")
_SYMBOL = re.compile(r"(?:^|[\s(,;:$])(\\?[A-Za-z](?:_?\w|_\{\w+\})?)\s*$")
_CONCLUDED = re.compile(
    r"\b(?:so|thus|hence|therefore|then|finally|get|gives?|find|have found|conclude)\b[^.\n]{0,20}$", re.IGNORECASE
)


def candidates(text: str, answer_type: str) -> list[str]:
    """The answers that a piece of a thought states, in order.

    Values of several symbols, "a = 7. And b = 5", are givens and steps: none of them is stated as the answer unless a word like "so"
    concludes it. Nor are options that are listed: "options are (A), (B), (C)".
    """
    return [answer for _, answer in placed_candidates(text, answer_type)][-MAX_CANDIDATES:]


def placed_candidates(text: str, answer_type: str) -> list[tuple[int, str]]:
    """All of them, with their places in the text."""
    found = [(text.rfind(box), box) for box in boxes(text)]
    found += [(match.start(1), match[1]) for match in _STATED.finditer(text)]
    if answer_type == "choice":
        found += _options(text)
    elif answer_type != "list":
        found += _numbers(text)
    return [(at, answer.replace("$", "").replace("\\(", "").strip(" *")) for at, answer in sorted(set(found))]


def concludes(text: str) -> bool:
    """Whether a piece gives its answer as such: in a box, or as "answer is"."""
    return bool(boxes(text)) or _STATED.search(text) is not None


def _numbers(text: str) -> list[tuple[int, str]]:
    equations = [(match.start(1), match[1], _bare_symbol(text[: match.start()])) for match in _EQUALS.finditer(text)]
    several = len({symbol for _, _, symbol in equations if symbol}) > 1
    found = [
        (at, number)
        for at, number, symbol in equations
        if not (symbol and several) or _CONCLUDED.search(text[: max(0, at)].rpartition(symbol)[0])
    ]
    taken = {at for at, _ in found}
    return found + [(match.start(1), match[1]) for match in _RESULT.finditer(text) if match.start(1) not in taken]


def _bare_symbol(before: str) -> str:
    """The symbol that stands alone left of an equals sign; empty for a calculation, a word, or the end of a chain."""
    match = _SYMBOL.search(before)
    if match is None:
        return ""
    left = before[: match.start(1)].rstrip(" $(")
    return "" if left.endswith(("+", "-", "*", "/", "=", "^", "×", "·", "\\cdot", "\\times")) else match[1]


def _options(text: str) -> list[tuple[int, str]]:
    """Letters of options, but for those that a sentence or the starts of lines list."""
    found = []
    for sentence in _SENTENCE.finditer(text):
        here = [(match.start(), match.end(), match[1] or match[2]) for match in _OPTION.finditer(sentence[0])]
        if len({letter for _, _, letter in here}) > 2:
            continue
        for index, (start, end, letter) in enumerate(here):
            beside = [sentence[0][here[index - 1][1] : start]] if index else []
            beside += [sentence[0][end : here[index + 1][0]]] if index + 1 < len(here) else []
            listed = any(re.fullmatch(r"\s*(?:,|;|/|or|and|to|,\s*(?:or|and))?\s*", between) for between in beside)
            label = re.match(r"\s*[-*]?\s*\(?[A-J]\)\s+(?!(?:is|must|seems|looks|fits|holds|works)\b)\w", sentence[0])
            if not listed and not (label and start < label.end()):
                found.append((sentence.start() + start, letter))
    return found
