r"""Whether two formulas are the same function of their symbols, and two answers (``structure``) the same part by part.

Rational constants are compared exactly. Everything else is evaluated with 40 digits (large numbers with more) at fixed pseudo-random values of the
symbols: two formulas of the lengths that are read here which agree in 25 digits at several such points are equal (the
argument of Schwartz and Zippel). Symbols are positive, so that \sqrt{a^2} is a, unless a formula holds |x|. The comparison
is relative, and never rounds to decimals: 1.6e-19 is not 3.2e-19.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from math import gcd
from typing import Any

from reasoning_evals.grading.evaluate import approximate, cancels, context, exact, interval_of, real_set, symbols_of
from reasoning_evals.grading.formula import Reading, read
from reasoning_evals.grading.records import Tree, Unreadable
from reasoning_evals.grading.structure import FLIPPED, Answer, along_axes, in_components, letters, named_tuple

POINTS = 5
NEEDED = 2
AGREEMENT = 25
"""Digits in which values of equal formulas agree."""
_NONE = re.compile(r"(?:there(?:is|are))?no(?:real|such)?solutions?(?:exists?)?|none|emptyset")
_REAL = {"union", "set", "relation", "complement", "sequence"}
DECIMAL_DIGITS = 6
"""Digits in which they agree when one of them is written with decimals."""


def same_formula(target: str, answer: str) -> bool:
    """Whether two formulas (from ``clean``) are equal under some common way to read them.

    Ambiguous notation is read in favour of the answer: 1/2x is (1/2)x or 1/(2x), log is natural or decimal, 50 % is 0.5 or 50.
    Raises Unreadable when one of them is not a formula.
    """
    targets, answers = _readings(target), _readings(answer)
    decimals, bars = (any(getattr(one[0], name) for one in (targets, answers)) for name in ("decimals", "bars"))
    if any(_same(ours.tree, theirs.tree, decimals, bars) for ours in targets for theirs in answers):
        return True
    if targets[0].percent == answers[0].percent:
        return False
    scale: Tree = ("num", Fraction(100) if targets[0].percent else Fraction(1, 100))
    return _same(("prod", ((1, targets[0].tree), (1, scale))), answers[0].tree, decimals, False)


def proportional(left: tuple[str, str], right: tuple[str, str]) -> Fraction | float | None:
    """The constant c with left[0] - left[1] = c * (right[0] - right[1]) at every point; None when there is no such constant.

    Two equations say the same when the differences of their sides are proportional: 2x = 4 and x - 2 = 0 have c = 2. For
    inequalities the sign of c says whether the sign < becomes >: -x < 1 and x > -1.
    """
    difference, other = (("sum", ((1, read(first).tree), (-1, read(second).tree))) for first, second in (left, right))
    ratios = []
    for values in _points(symbols_of(difference) | symbols_of(other), False):
        above, below = approximate(difference, values), approximate(other, values)
        if abs(below) < context().mpf(10) ** -30:
            return None
        ratios.append(above / below)
    agree = all(_agree(ratio, ratios[0], AGREEMENT - 5) for ratio in ratios)
    return float(context().re(ratios[0])) if agree else None


def _readings(text: str) -> list[Reading]:
    first = read(text)
    found = [first]
    if first.slash:
        found.append(read(text, tight=True))
    if first.bare_log:
        found += [read(text, tight=reading is not first, log_base=10) for reading in list(found)]
    return found


def _same(target: Tree, answer: Tree, decimals: bool, signed: bool) -> bool:
    digits = DECIMAL_DIGITS if decimals else AGREEMENT
    ours, theirs = exact(target), exact(answer)
    if ours is not None and theirs is not None and not decimals:
        return ours == theirs
    symbols = symbols_of(target) | symbols_of(answer)
    noise = cancels(target) or cancels(answer)
    compared = 0
    for values in _points(symbols, signed) if symbols else iter([{}]):
        try:
            left, right = approximate(target, values), approximate(answer, values)
            if not _agree(left, right, digits, noise):
                return False
            if not decimals and 10**10 < abs(left) < 10**500:  # 100! is not 100! - 1
                more = 2 * int(context().log10(abs(left)))  # what cosh 100 and sinh 100 differ by
                with context().workdps(AGREEMENT + 15 + more):
                    left, right = approximate(target, values), approximate(answer, values)
                    if not _agree(left, right, AGREEMENT + more, noise):
                        return False
        except Unreadable:
            continue
        compared += 1
    if compared < (NEEDED if symbols else 1):
        raise Unreadable("has no value at the points of comparison")
    return True


def _agree(left: Any, right: Any, digits: int, noise: bool = True) -> bool:
    ctx = context()
    size = max(abs(left), abs(right))
    if min(abs(left), abs(right)) == 0:
        return bool(size < ctx.mpf(10) ** -30) if noise else size == 0  # what cancellation leaves in place of zero
    return bool(abs(left - right) <= size * ctx.mpf(10) ** -digits)


def _points(symbols: set[str], signed: bool) -> Iterator[dict[str, Any]]:
    for point in range(POINTS):
        yield {name: _value(name, point, signed) for name in symbols}


@lru_cache(maxsize=4096)
def _value(name: str, point: int, signed: bool) -> Any:
    generator = random.Random(f"{point}/{name}")
    value = Fraction(generator.randrange(3 * 10**14, 3 * 10**15), 10**15)
    if signed and point % 2 and generator.random() < 0.7:
        value = -value
    ctx = context()
    return ctx.mpf(value.numerator) / value.denominator


def same_answer(target: Answer, answer: Answer) -> bool:
    """Whether two answers mean the same. Raises Unreadable where a part is not a formula, so that another grader may try."""
    if "words" in (target.kind, answer.kind):
        if all(_NONE.fullmatch(one.text) or (one.kind == "set" and not one.parts) for one in (target, answer)):
            return True
        return not target.parts and not answer.parts and letters(target.text) == letters(answer.text)
    kinds = {target.kind, answer.kind}
    if kinds == {"set", "sequence"} and (tuple_of := named_tuple(answer if answer.kind == "set" else target)):
        return same_answer(tuple_of, target if answer.kind == "set" else answer)
    if kinds == {"set"} and (ours := named_tuple(target)) and (theirs := named_tuple(answer, target)):
        return same_answer(ours, theirs)
    points = kinds == {"set", "sequence"} and any(
        part.kind == "sequence" for one in (target, answer) if one.kind == "set" for part in one.parts
    )
    related = kinds == {"set"} and all(part.kind == "relation" for one in (target, answer) for part in one.parts)
    if (
        kinds <= _REAL
        and not points
        and (related or kinds not in ({"set"}, {"sequence"}, {"relation"}, {"sequence", "relation"}))
    ):
        try:
            return real_set(target) == real_set(answer)
        except Unreadable:  # intervals with symbols
            pass
    if len(kinds) > 1:
        return _mixed(target, answer)
    if target.kind == "value":
        texts = target.text, answer.text
        along = tuple(map(along_axes, texts))
        axes = {target.name.strip(), answer.name.strip()} & set("xyz")  # x = 5 is another line than y = 5
        if _same_equation(target, answer) or (len(axes) < 2 and same_formula(*texts)):
            return True
        return len(axes) < 2 and along != texts and all(along) and same_formula(*map(str, along))
    if target.kind == "relation":
        return _same_relation(target, answer)
    if target.kind == "ratio":
        return _same_ratio(target, answer)
    if len(target.parts) != len(answer.parts) or (
        target.text != answer.text and (target.kind != "set" or (target.text and answer.text))
    ):
        return False
    if target.kind in ("set", "union"):
        return _same_set(list(target.parts), list(answer.parts))
    return all(same_answer(ours, theirs) for ours, theirs in zip(target.parts, answer.parts, strict=True))


def _same_equation(target: Answer, answer: Answer) -> bool:
    """m a = F and F = m a: each side is the other's name."""
    if not (target.name and answer.name):
        return False
    try:
        return same_formula(target.name, answer.text) and same_formula(target.text, answer.name)
    except Unreadable:
        return False


def _mixed(target: Answer, answer: Answer) -> bool:
    kinds = {target.kind, answer.kind}
    if kinds == {"value", "relation"}:
        value, relation = (target, answer) if target.kind == "value" else (answer, target)
        if value.name and relation.text == "=":
            named = Answer("relation", "=", (Answer("value", value.name), Answer("value", value.text)))
            return _same_relation(named, relation)
        return False
    if kinds == {"value", "ratio"}:
        value, ratio = (target, answer) if target.kind == "value" else (answer, target)
        first, *others = [part.text for part in ratio.parts]
        return len(others) == 1 and not is_clock(ratio, False) and same_formula(value.text, f"({first})/({others[0]})")
    if "value" in kinds and kinds & {"sequence", "matrix"}:  # (3, -4) as 3 i - 4 j
        value, vector = (target, answer) if target.kind == "value" else (answer, target)
        axes = in_components(vector)
        return bool(axes and re.search(r"\\hat|(?<![a-zA-Z])j", value.text)) and same_formula(
            str(axes), str(along_axes(value.text))
        )
    if kinds == {"matrix", "sequence"}:  # a column, or rows in brackets
        matrix, sequence = (target, answer) if target.kind == "matrix" else (answer, target)
        if matrix.text:
            return False
        rows = [part.parts if part.kind == "sequence" else (part,) for part in sequence.parts]
        return [len(row) for row in rows] == [len(row.parts) for row in matrix.parts] and all(
            same_answer(ours, theirs)
            for row, other in zip(matrix.parts, rows, strict=True)
            for ours, theirs in zip(row.parts, other, strict=True)
        )
    if kinds == {"sequence", "relation"}:
        sequence, relation = (target, answer) if target.kind == "sequence" else (answer, target)
        interval = interval_of(relation)
        return interval is not None and same_answer(sequence, interval)
    return False


def _same_set(targets: list[Answer], answers: list[Answer]) -> bool:
    """Each target has its own answer, in any order. Equality of formulas is transitive, so the first match is always right
    (unlike numbers within a tolerance, see ``lists``)."""
    left = list(answers)
    for target in targets:
        match = next((index for index, answer in enumerate(left) if same_answer(target, answer)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _same_relation(target: Answer, answer: Answer) -> bool:
    ours, theirs = target.text.split(), answer.text.split()
    sides = [part.text for part in answer.parts]
    if ours != theirs:
        if [FLIPPED.get(operator, operator) for operator in theirs[::-1]] != ours:
            return False
        sides, theirs = sides[::-1], ours
    for index, operator in enumerate(ours):
        left = (target.parts[index].text, target.parts[index + 1].text)
        ratio = proportional(left, (sides[index], sides[index + 1]))
        if not ratio or (operator not in ("=", "\\neq") and ratio < 0):
            return False
    return True


def _same_ratio(target: Answer, answer: Answer) -> bool:
    """Clock times by the second, ratios up to a common factor. A target like 9:30, which a ratio would shorten, is a time."""
    if is_clock(target, True) or is_clock(answer, False):
        ours, theirs = seconds(target), seconds(answer)
        if ours is None or theirs is None:
            return False
        day = 43_200 if answer.text and not target.text else 86_400  # 2:00 does not say which half of the day
        return (ours - theirs) % day == 0
    first, other = target.parts[0], answer.parts[0]
    return len(target.parts) == len(answer.parts) and all(
        same_formula(f"({mine.text})*({other.text})", f"({their.text})*({first.text})")
        for mine, their in zip(target.parts, answer.parts, strict=True)
    )


def is_clock(ratio: Answer, target: bool) -> bool:
    """Whether a ratio is a clock time: 2:00 PM, 2:05, and of a target 9:30, since a ratio would be 3:10."""
    digits = [part.text for part in ratio.parts]
    if ratio.text or any(re.fullmatch(r"0\d", text) for text in digits[1:]):
        return True
    return target and seconds(ratio) is not None and gcd(*map(int, digits)) > 1


def seconds(clock: Answer) -> int | None:
    """Seconds since midnight, None for a ratio that is no clock time."""
    if not all(re.fullmatch(r"\d\d?", part.text) for part in clock.parts) or not 2 <= len(clock.parts) <= 3:
        return None
    hour, *below = [int(part.text) for part in clock.parts]
    if hour > 24 or any(value > 59 or len(part.text) < 2 for value, part in zip(below, clock.parts[1:], strict=True)):
        return None
    hour = hour % 12 + 12 * (clock.text == "p") if clock.text else hour
    return hour * 3600 + sum(value * unit for value, unit in zip(below, (60, 1), strict=False))
