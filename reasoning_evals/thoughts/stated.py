"""The answers that a piece of a thought states: boxes, "answer is X", results at the end of a clause, option letters."""

from __future__ import annotations

import re

from reasoning_evals.answers import boxes

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
