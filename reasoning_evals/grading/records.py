"""What all graders share: the boxes around answers, the verdict on one, the limits of what is read, formulas as trees of tuples.

Answers come from models and a box may contain anything, hence the limits.

A tree is one of

``("num", Fraction)``, ``("sym", name)``, ``("sum", ((sign, tree), ...))``, ``("prod", ((power, tree), ...))`` with sign and
power 1 or -1, ``("pow", base, exponent)``, ``("binom", n, k)``, ``("call", function,
tree)``, ``("of", max | min | gcd | lcm, tree, tree)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

MAX_CHARS = 2_000
"""Longest answer that is read as a formula."""
MAX_NESTING = 40
"""Deepest nesting of brackets and functions."""
MAX_BITS = 20_000
"""Largest integer that is computed exactly; beyond it numbers are floating point with 40 digits."""
MAX_LOG = 1e7
"""Largest natural logarithm of a number that is computed."""

BOX = re.compile(r"\\boxed(?![a-zA-Z])\s*")
_OTHER_BOX = re.compile(r"\\(?:fbox|framebox(?:\s*\[[^\[\]]*\])*)(?![a-zA-Z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"[^\s${}\\,;]+|\\[a-zA-Z]+[^\s$]*")
_BARE_WORD = re.compile(r"(?:\x08|(?<![\\a-zA-Z])b)oxed(?=\s*\{)")
"""A box whose backslash was eaten on the way."""
_MENTION = re.compile(
    r"(\\boxed)(?![a-zA-Z])(?:\s*\{([^{}]{0,60}(?:\{[^{}]{0,40}\})?\s{0,9})\}|(?=\s*(?:[.,;:!?)`'\"](?!\d)|[a-zA-Z]{2,})))(?:[.,:;](?=\s|$))?"
)
"""A box without an answer: the bare word in prose, or a box that may be a placeholder."""
_PLACEHOLDER = re.compile(
    r"(?i)(?:(?:the|your|my|final|numerical|correct) )*(?:answer|result|solution|number|value|letter|option|expression|choice)?(?: here)?"
    r" ?(?:\.{2,}|\u2026|\\[lc]?dots|\?|_+)?"
)

Tree = tuple[Any, ...]
ONE: Tree = ("num", Fraction(1))
MINUS_ONE: Tree = ("sum", ((-1, ONE),))
DEGREE: Tree = ("prod", ((1, ("sym", "pi")), (-1, ("num", Fraction(180)))))
OUTCOMES = ("correct", "wrong", "no_answer", "cut", "unclosed", "truncated", "grader_error")
"""truncated: the response is inside a thought to its end. Of a run it is also known whether it ended by itself. unclosed: so it
did, inside a thought. cut: so it did not, and the token limit came before an answer."""


class Unreadable(ValueError):
    """The text is not a formula of this grammar."""


class Contradiction(Unreadable):
    """The text says that two different numbers are equal."""


class TooLarge(Unreadable):
    """The text is longer, deeper or larger in value than the limits above."""


def check_size(text: str) -> str:
    """The text itself; TooLarge when it is too long."""
    if len(text) > MAX_CHARS:
        raise TooLarge(f"answer of {len(text)} characters is longer than {MAX_CHARS}")
    return text


def top_level(text: str, separators: str) -> list[str]:
    """Split at single-character separators outside all brackets; escaped braces count as brackets."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth = max(0, depth - 1)
        elif depth == 0 and char in separators:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def signed(sign: int, tree: Tree) -> Tree:
    """The tree with this sign."""
    return tree if sign == 1 else ("sum", ((-1, tree),))


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one response, and how it was found.

    ``extracted`` is the final answer as written, None where there is none. ``method`` says how it was found ("box",
    "phrase", "last number", ...); ``reason`` says in words why the verdict is what it is.
    """

    outcome: str
    extracted: str | None
    reason: str
    method: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}: expected one of {', '.join(OUTCOMES)}")

    @property
    def is_correct(self) -> bool:
        return self.outcome == "correct"


class Verdict(NamedTuple):
    """Outcome and reason for one extracted answer."""

    outcome: str
    reason: str


def correct(reason: str) -> Verdict:
    return Verdict("correct", reason)


def wrong(reason: str) -> Verdict:
    return Verdict("wrong", reason)


def bad_target(reason: object) -> Verdict:
    """The problem's own target cannot be read, so the answer cannot be judged."""
    return Verdict("grader_error", f"target: {reason}")


def short(text: object, limit: int = 60) -> str:
    """A text shortened for a one-line reason."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def in_any_order(targets: list[str], count: int, judge: Callable[[int, int], Verdict]) -> Iterator[Verdict]:
    """Match answers and targets one to one, by augmenting paths.

    Why not "take the first that fits": within a tolerance one answer may fit two targets. Targets 1.00 and 1.01 at 1 %, answers
    1.005 and 0.995: 1.005 fits both, 0.995 only the first. A greedy choice gives 1.005 to the first target and then finds no
    target for 0.995."""
    taken_by: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column in sorted(range(count), key=lambda other: other != row):  # the same order is likely
            if column not in seen and judge(row, column).outcome == "correct":
                seen.add(column)
                if column not in taken_by or place(taken_by[column], seen):
                    taken_by[column] = row
                    return True
        return False

    for row, target in enumerate(targets):
        if place(row, set()):
            yield correct("equal to one of the values")
        else:
            verdicts = [judge(row, column) for column in range(count)]
            unsure = [verdict for verdict in verdicts if verdict.outcome not in ("correct", "wrong")]
            yield unsure[0] if unsure else wrong(f"no value for {short(target)}")


def boxes(text: str) -> list[str]:
    r"""Contents of all balanced boxes in order of their closing, inner boxes unwrapped, without empty ones.

    >>> boxes(r"\boxed{1} or \boxed{\frac{1}{2}} or \boxed{3")
    ['1', '\\frac{1}{2}']
    """
    text = _BARE_WORD.sub(r"\\boxed", without_mentions(text))
    starts = list(BOX.finditer(text))
    if not starts:
        return []
    closing = closing_braces(text, starts[0].start())
    found = []
    outer_end = -1
    for start in starts:
        position = start.end()
        if position < outer_end:
            continue  # a box inside a box is part of it
        if text.startswith("{", position):
            end = closing.get(position)
            if end is None:
                continue
            content, outer_end = text[position + 1 : end], end
        else:
            bare = _BARE_BOX.match(text, position)
            content = bare.group() if bare else ""
        content = _unwrap(content.strip())
        if content:
            found.append(content)
    return found


def without_mentions(text: str) -> str:
    r"""The text without boxes that hold no answer: "put it in \boxed", "in \boxed{...}"; other commands for a box as \boxed."""
    text = _OTHER_BOX.sub(r"\\boxed", text)

    def kept(match: re.Match[str]) -> str:
        inside = match[2]
        words = None if inside is None else " ".join(re.sub(r"\\text|[{}]", " ", inside).split())
        return "" if words is None or _PLACEHOLDER.fullmatch(words) else match[0]

    return _MENTION.sub(kept, text) if "\\boxed" in text else text


def last_box(text: str) -> str | None:
    """The content of the last balanced box that is not empty."""
    found = boxes(text) if "box" in text or "\x08oxed" in text else []
    return found[-1] if found else None


def closing_braces(text: str, start: int) -> dict[int, int]:
    """Position of each opening brace from ``start`` on -> position of its closing brace; escaped braces do not count."""
    stack: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closing[stack.pop()] = match.start()
    return closing


def _unwrap(content: str) -> str:
    """The content of boxes that contain only another box."""
    for _ in range(4):
        match = BOX.match(content)
        if not match or not content.startswith("{", match.end()):
            break
        if closing_braces(content, match.end()).get(match.end()) != len(content) - 1:
            break
        content = content[match.end() + 1 : -1].strip()
    return content
