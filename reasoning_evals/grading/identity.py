r"""Whether two formulas are the same function of their symbols.

Rational constants are compared exactly. Everything else is evaluated with 40 digits at fixed pseudo-random values of the
symbols: two formulas of the lengths that are read here which agree in 25 digits at several such points are equal (the
argument of Schwartz and Zippel). Symbols are positive, so that \sqrt{a^2} is a, unless a formula holds |x|. The comparison
is relative, and never rounds to decimals: 1.6e-19 is not 3.2e-19.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reasoning_evals.grading.evaluate import approximate, context, exact
from reasoning_evals.grading.formula import Reading, read
from reasoning_evals.grading.records import Tree, Unreadable

POINTS = 5
NEEDED = 2
AGREEMENT = 25
"""Digits in which values of equal formulas agree."""
DECIMAL_DIGITS = 6
"""Digits in which they agree when one of them is written with decimals."""


def same_formula(target: str, answer: str) -> bool:
    """Whether two formulas (from ``clean``) are equal under some common way to read them.

    Ambiguous notation is read in favour of the answer: 1/2x is (1/2)x or 1/(2x), log is natural or decimal, 50 % is 0.5 or 50.
    Raises Unreadable when one of them is not a formula.
    """
    targets, answers = _readings(target), _readings(answer)
    decimals = targets[0].decimals or answers[0].decimals
    if any(_same(ours.tree, theirs.tree, decimals, _bars(ours, theirs)) for ours in targets for theirs in answers):
        return True
    if targets[0].percent == answers[0].percent:
        return False
    hundred: Tree = ("num", Fraction(100))
    ours, theirs = targets[0].tree, answers[0].tree
    if targets[0].percent:
        ours = ("prod", ((1, ours), (1, hundred)))
    else:
        theirs = ("prod", ((1, theirs), (1, hundred)))
    return _same(ours, theirs, decimals, False)


def proportional(left: tuple[str, str], right: tuple[str, str]) -> Fraction | float | None:
    """The constant c with left[0] - left[1] = c * (right[0] - right[1]) at every point; None when there is no such constant.

    Two equations say the same when the differences of their sides are proportional: 2x = 4 and x - 2 = 0 have c = 2. For
    inequalities the sign of c says whether the sign < becomes >: -x < 1 and x > -1.
    """
    difference, other = (("sum", ((1, read(first).tree), (-1, read(second).tree))) for first, second in (left, right))
    ratios = []
    for values in _points(_symbols(difference) | _symbols(other), False):
        try:
            above, below = approximate(difference, values), approximate(other, values)
        except Unreadable:
            continue
        if abs(below) < context().mpf(10) ** -30:
            return None
        ratios.append(above / below)
    if len(ratios) < NEEDED or ratios[0] == 0:
        return None
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


def _bars(ours: Reading, theirs: Reading) -> bool:
    return ours.bars or theirs.bars


def _same(target: Tree, answer: Tree, decimals: bool, signed: bool) -> bool:
    digits = DECIMAL_DIGITS if decimals else AGREEMENT
    ours, theirs = exact(target), exact(answer)
    if ours is not None and theirs is not None:
        if not decimals:
            return ours == theirs
        return abs(ours - theirs) <= Fraction(1, 10**digits) * max(abs(ours), abs(theirs))
    symbols = _symbols(target) | _symbols(answer)
    compared = 0
    failure: Unreadable | None = None
    for values in _points(symbols, signed) if symbols else iter([{}]):
        try:
            left, right = approximate(target, values), approximate(answer, values)
        except Unreadable as error:
            failure = error
            continue
        if not _agree(left, right, digits):
            return False
        compared += 1
    if compared < (NEEDED if symbols else 1):
        raise failure or Unreadable("has no value at the points of comparison")
    return True


def _agree(left: Any, right: Any, digits: int) -> bool:
    ctx = context()
    size = max(abs(left), abs(right))
    if min(abs(left), abs(right)) == 0:
        return bool(size < ctx.mpf(10) ** -30)  # the rounding error that cancellation leaves in place of zero
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


def _symbols(tree: Tree) -> set[str]:
    """Names without a fixed meaning."""
    kind = tree[0]
    if kind == "sym":
        return set() if tree[1] in ("pi", "e", "i") else {tree[1]}
    if kind == "num":
        return set()
    if kind in ("sum", "prod"):
        return set().union(*(_symbols(part) for _, part in tree[1]))
    return set().union(*(_symbols(part) for part in tree[1:] if isinstance(part, tuple)))
