"""The value of a formula's tree: exact where it is rational and small enough, else with 40 digits; and what numbers an answer allows."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from reasoning_evals.grading.formula import read
from reasoning_evals.grading.records import MAX_BITS, MAX_LOG, TooLarge, Tree, Unreadable
from reasoning_evals.grading.structure import FLIPPED, NAME, Answer, plus_minus

DIGITS = 40
_LOCAL = threading.local()


def context() -> Any:
    """This thread's own arithmetic: mpmath's global precision is shared with other threads and libraries."""
    if not hasattr(_LOCAL, "context"):
        _LOCAL.context = mpmath.MPContext()
        _LOCAL.context.dps = DIGITS
    return _LOCAL.context


def exact(tree: Tree) -> Fraction | None:
    """The rational value; None where a part may be irrational (symbols, functions, roots, huge powers)."""
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "sum":
        return _all(tree[1], lambda total, sign, value: total + sign * value, Fraction(0))
    if kind == "prod":
        return _all(tree[1], _times, Fraction(1))
    if kind == "pow":
        base, exponent = exact(tree[1]), exact(tree[2])
        return None if base is None or exponent is None else _exact_power(base, exponent)
    if kind == "binom" or tree[:2] == ("call", "factorial"):
        values = [exact(part) for part in tree[1:] if isinstance(part, tuple)]
        if all(value is not None and value.denominator == 1 and 0 <= value <= 2000 for value in values):
            above, *below = (int(value) for value in values if value is not None)
            return Fraction(math.comb(above, below[0]) if below else math.factorial(above))
    return None


def approximate(tree: Tree, values: Mapping[str, Any] | None = None) -> Any:
    """The value as a 40-digit real or complex number of ``context()``.

    ``values`` gives the symbols; e, i and pi have their meaning. Raises Unreadable for a symbol without a value, a division
    by zero or a value that is not finite, TooLarge for numbers beyond exp(MAX_LOG).
    """
    ctx = context()
    try:
        value = _approximate(tree, values or {}, ctx)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"has no value ({error})") from error
    if not ctx.isfinite(value):
        raise Unreadable("has no finite value")
    return value


def number(tree: Tree) -> Any:
    """A real value: a Fraction where it is rational, else a 40-digit number. Unreadable when it is not real."""
    rational = exact(tree)
    if rational is not None:
        return rational
    value = approximate(tree)
    ctx = context()
    if ctx.im(value) != 0:
        if abs(ctx.im(value)) > abs(value) * ctx.mpf(10) ** -30:
            raise Unreadable("is not a real number")
        value = ctx.re(value)
    return ctx.re(value)


def cancels(tree: Tree) -> bool:
    """Whether its value may be the rounding error of a difference."""
    if tree[0] in ("sum", "prod"):
        return (tree[0] == "sum" and len(tree[1]) > 1) or any(cancels(part) for _, part in tree[1])
    inner = [part for part in tree[1:] if isinstance(part, tuple)]
    return (tree[0] == "call" and tree[1] not in ("factorial", "exp")) or any(map(cancels, inner))


def symbols_of(tree: Tree) -> set[str]:
    """Names without a fixed meaning."""
    kind = tree[0]
    if kind == "sym":
        return set() if tree[1] in ("pi", "e", "i") else {tree[1]}
    if kind in ("sum", "prod"):
        return set().union(*(symbols_of(part) for _, part in tree[1]))
    return set().union(*(symbols_of(part) for part in tree[1:] if isinstance(part, tuple)))


def _all(parts: Any, step: Callable[[Fraction, int, Fraction], Fraction | None], start: Fraction) -> Fraction | None:
    total: Fraction | None = start
    for mark, part in parts:
        value = exact(part)
        if value is None or total is None:
            return None
        total = step(total, mark, value)
        if total is None or _bits(total) > MAX_BITS:
            return None
    return total


def _times(total: Fraction, power: int, value: Fraction) -> Fraction:
    if power == -1 and value == 0:
        raise Unreadable("divides by zero")
    return total * value if power == 1 else total / value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1 or abs(exponent) * _bits(base) > MAX_BITS:
        return None
    if base == 0 and exponent < 0:
        raise Unreadable("divides by zero")
    return base ** int(exponent)


def _approximate(tree: Tree, values: Mapping[str, Any], ctx: Any) -> Any:
    kind = tree[0]
    if kind == "num":
        return ctx.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "sym":
        return _symbol(tree[1], values, ctx)
    if kind == "sum":
        return ctx.fsum(sign * _approximate(part, values, ctx) for sign, part in tree[1])
    if kind == "prod":
        total = ctx.mpf(1)
        for power, part in tree[1]:
            value = _approximate(part, values, ctx)
            total = total * value if power == 1 else total / value
        return total
    if kind == "pow":
        base, exponent = _approximate(tree[1], values, ctx), exact(tree[2])
        if exponent is not None and exponent.denominator % 2 and ctx.im(base) == 0 and ctx.re(base) < 0:
            size = _power(-ctx.re(base), ctx.mpf(exponent.numerator) / exponent.denominator, ctx)
            return -size if exponent.numerator % 2 else size  # (x - 1)^{1/3} is the cube root of x - 1, which is real
        return _power(base, _approximate(tree[2], values, ctx), ctx)
    if kind == "binom":
        above, below = _approximate(tree[1], values, ctx), _approximate(tree[2], values, ctx)
        return _factorial(above, ctx) / _factorial(below, ctx) / _factorial(above - below, ctx)
    if kind == "of":
        return _of_two(tree[1], _approximate(tree[2], values, ctx), _approximate(tree[3], values, ctx), ctx)
    value = _approximate(tree[2], values, ctx)
    return _FUNCTIONS[tree[1]](value, ctx)


def _of_two(name: str, left: Any, right: Any, ctx: Any) -> Any:
    if ctx.im(left) or ctx.im(right):
        raise Unreadable(f"{name} is of real numbers")
    if name in ("max", "min"):
        return (max if name == "max" else min)(ctx.re(left), ctx.re(right))
    if not (ctx.isint(left) and ctx.isint(right) and max(abs(left), abs(right)) < 10**DIGITS):
        raise Unreadable(f"{name} is of whole numbers")
    return ctx.mpf((math.gcd if name == "gcd" else math.lcm)(int(left), int(right)))


def _symbol(name: str, values: Mapping[str, Any], ctx: Any) -> Any:
    if name in values:
        return values[name]
    constants = {"pi": ctx.pi, "e": ctx.e, "i": ctx.j}
    if name not in constants:
        raise Unreadable(f"holds the symbol {name}")
    return +constants[name]


def _power(base: Any, exponent: Any, ctx: Any) -> Any:
    if base == 0:
        return base**exponent
    _check_log(exponent * ctx.log(abs(base)))
    return base**exponent


def _exp(value: Any, ctx: Any) -> Any:
    _check_log(value)
    return ctx.exp(value)


def _factorial(value: Any, ctx: Any) -> Any:
    if abs(value) > 100_000:
        raise TooLarge("a factorial is too large to compute")
    return ctx.factorial(value)


def _check_log(logarithm: Any) -> None:
    if abs(logarithm) > MAX_LOG:
        raise TooLarge("a number is too large to compute")


def _bounded(name: str) -> Callable[[Any, Any], Any]:
    """A function whose argument must stay small enough for its cost to stay small."""

    def call(value: Any, ctx: Any) -> Any:
        _check_log(value)
        return getattr(ctx, name)(value)

    return call


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "abs": lambda value, ctx: abs(value),
    "lfloor": lambda value, ctx: ctx.floor(value),
    "lceil": lambda value, ctx: ctx.ceil(value),
    "factorial": _factorial,
    "exp": _exp,
    "ln": lambda value, ctx: ctx.log(value),
    **{name: _bounded(name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth")},
    **{f"arc{name}": _bounded(f"a{name}") for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh")},
}


Cuts = list[tuple[tuple[Any, int], tuple[Any, int]]]
_BELOW, _ABOVE = (float("-inf"), 1), (float("inf"), 0)


def joined(pieces: Cuts) -> Cuts:
    """The union of pieces of the real line, sorted. The cut (x, 0) lies just below x, (x, 1) just above."""
    whole: Cuts = []
    for start, end in sorted(pieces):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(whole[-1][1], end))
        elif start < end:
            whole.append((start, end))
    return [(max(start, _BELOW), min(end, _ABOVE)) for start, end in whole]


def complement(pieces: Cuts) -> Cuts:
    """The rest of the real line."""
    cuts = [_BELOW, *(cut for piece in pieces for cut in piece), _ABOVE]
    return [(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True) if start < end]


def end_at(text: str) -> Any:
    """The end of an interval: a Fraction, or an infinity."""
    infinite = re.fullmatch(r"\s*([+-]?)\s*\\infty\s*", text)
    value = float(infinite[1] + "inf") if infinite else number(read(text).tree)
    return value if isinstance(value, Fraction | float) else Fraction(context().nstr(value, 25))


def point_at(text: str) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """The piece of the real line that is one number."""
    return (end_at(text), 0), (end_at(text), 1)


def interval_of(relation: Answer) -> Answer | None:
    """x <= 3 as (-oo, 3], 1 < x <= 5 as (1, 5]; None for other relations."""
    operators, sides = relation.text.split(), [part.text for part in relation.parts]
    if operators[0] in (">", "\\geq"):
        operators, sides = [FLIPPED.get(operator, operator) for operator in operators[::-1]], sides[::-1]
    if any(operator not in ("<", "\\leq") for operator in operators):
        return None
    if len(sides) == 2:
        below = bool(NAME.fullmatch(sides[0]))
        sides = ["-\\infty", *sides] if below else [*sides, "\\infty"]
        operators = ["<", *operators] if below else [*operators, "<"]
    if len(sides) != 3 or not NAME.fullmatch(sides[1]):
        return None
    brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    return Answer("sequence", brackets, (Answer("value", sides[0]), Answer("value", sides[2])))


def real_set(answer: Answer) -> Cuts:
    """A set of real numbers as sorted pieces from one cut to another; the cut (x, 0) lies just below x, (x, 1) just above."""
    if answer.kind == "relation":
        if answer.text == "\\neq" and NAME.fullmatch(answer.parts[0].text):
            return complement(joined([point_at(text) for text in plus_minus(answer.parts[1].text)]))
        answer = interval_of(answer) or answer
    if answer.kind == "sequence" and len(answer.parts) == 2 and answer.text in ("()", "[]", "(]", "[)"):
        left, right = (end_at(part.text) for part in answer.parts)
        if left > right or (left == right and answer.text != "[]"):
            raise Unreadable("not an interval: it does not go from left to right")
        return joined([((left, int(answer.text[0] == "(")), (right, int(answer.text[1] == "]")))])
    if answer.kind == "value":
        return [point_at(answer.text)]
    if answer.kind in ("set", "union", "complement"):
        related = [side.text for part in answer.parts if part.kind == "relation" for side in part.parts]
        names = set(filter(NAME.fullmatch, related))
        if len(names) > 1:
            raise Unreadable("not a set of numbers: several unknowns")
        parts = [real_set(part) for part in answer.parts]
        whole = joined([piece for part in parts for piece in part])
        alike = answer.text == "" and whole == complement([])
        if names and (alike or answer.text == "and"):  # x > 1, x < 3: both
            whole = complement(joined([piece for part in parts for piece in complement(part)]))
        return complement(whole) if answer.kind == "complement" else whole
    raise Unreadable("not a set of numbers")
