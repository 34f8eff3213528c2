"""Quantities: a number and a unit, compared after conversion, within a relative tolerance whatever the magnitude."""

from __future__ import annotations

from fractions import Fraction

from reasoning_evals.grading.amounts import Amount, Real, close, read_amount
from reasoning_evals.grading.evaluate import context
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.limits import Unreadable
from reasoning_evals.grading.numbers import show, tolerance_of, within
from reasoning_evals.grading.structure import parse_answer, same_answer
from reasoning_evals.grading.unit_names import Unit
from reasoning_evals.grading.units import parse_unit, unit_surface
from reasoning_evals.grading.verdict import Verdict, bad_target, correct, short, wrong
from reasoning_evals.problems import Problem

ROUNDING = Fraction(1, 10**12)
"""What the conversion of a unit may cost an exact comparison."""


def grade_quantity(problem: Problem, answer: str) -> Verdict:
    """Correct when the amounts agree in one unit.

    The target's unit stands in the target or in ``problem.unit``. An answer without a unit is taken to be in the asked
    unit, and the reason says so. Another dimension, or a unit that is not known, is wrong with a reason that begins with
    "unit". Hertz are cycles and never match radians per second.
    """
    try:
        target = read_amount(problem.target)
    except Unreadable as error:
        return bad_target(error)
    try:
        amount = read_amount(answer)
    except Unreadable as error:
        return _as_formula(problem.target, answer) or wrong(f"not a quantity: {error}")
    target_unit = target.rest or problem.unit or ""
    return compare_amounts(problem, target, target_unit, amount)


def _as_formula(target: str, answer: str) -> Verdict | None:
    """\\frac{\\sqrt{79} c}{10} for \\frac{\\sqrt{79}}{10} c: the unit is inside the formula."""
    try:
        same = same_answer(parse_answer(clean(target)), parse_answer(clean(answer)))
    except Unreadable:
        return None
    return correct("equal formulas") if same else None


def compare_amounts(problem: Problem, target: Amount, target_unit: str, amount: Amount) -> Verdict:
    """The verdict on an amount that was read; ``target_unit`` is the unit of the target's number."""
    tolerance, half = tolerance_of(problem, target, amount)
    surface = unit_surface(clean(target_unit))
    if not amount.rest:
        return _without_unit(problem, target, target_unit, amount, tolerance, half)
    if unit_surface(amount.rest) == surface:
        return _verdict(amount.value, target.value, tolerance, half, surface, surface)
    targets, answers = parse_unit(target_unit), parse_unit(amount.rest)
    if not targets:
        return wrong(
            f"unit: the target's unit {short(surface)!r} is not known, so {short(amount.rest)!r} cannot be compared"
        )
    if not answers:
        return wrong(f"unit: {short(amount.rest)!r} is not a known unit")
    pairs = [(ours, theirs) for ours in targets for theirs in answers if _comparable(ours, theirs)]
    if not pairs:
        return wrong(
            f"unit: {short(unit_surface(amount.rest))!r} does not measure what {surface or 'a pure number'!r} does"
        )
    for ours, theirs in pairs:
        if close(_convert(amount.value, theirs, ours), target.value, max(tolerance, ROUNDING), half):
            return correct(f"equal after conversion from {short(unit_surface(amount.rest))} {within(tolerance, half)}")
    converted = _convert(amount.value, pairs[0][1], pairs[0][0])
    return wrong(f"{show(converted)} {surface} is not {show(target.value)} {surface} {within(tolerance, half)}")


def _without_unit(
    problem: Problem, target: Amount, target_unit: str, amount: Amount, tolerance: Fraction, half: Fraction | None
) -> Verdict:
    asked = problem.unit or target_unit
    surface = unit_surface(clean(asked))
    targets, readings = parse_unit(target_unit), parse_unit(asked)
    if unit_surface(clean(target_unit)) == surface or not targets or not readings:
        verdict = _verdict(amount.value, target.value, tolerance, half, surface, "")
    else:
        value = _convert(amount.value, readings[0], targets[0])
        verdict = _verdict(value, target.value, max(tolerance, ROUNDING), half, unit_surface(clean(target_unit)), "")
    if verdict.outcome == "correct":
        return verdict if not surface else correct(f"{verdict.reason}; no unit given, taken as {surface}")
    pure = next((unit for unit in targets if not unit.dimensions and not unit.hertz and unit.factor != 1), None)
    if pure is not None and target.value != 0:  # 0.5 for 50 %, 0.52 for 30 degrees
        converted = _scaled(amount.value, 1 / Fraction(pure.factor))
        if close(converted, target.value, max(tolerance, ROUNDING), half):
            return correct(f"equal {within(tolerance, half)}; no unit given, taken as a pure number")
    return verdict


def _verdict(
    value: Real, target: Real, tolerance: Fraction, half: Fraction | None, unit: str, answer_unit: str
) -> Verdict:
    if close(value, target, tolerance, half):
        return correct(f"equal {within(tolerance, half)}")
    return wrong(
        f"{show(value)} {answer_unit}".strip()
        + f" is not {show(target)} {unit}".rstrip()
        + f" {within(tolerance, half)}"
    )


def _comparable(ours: Unit, theirs: Unit) -> bool:
    if ours.dimensions != theirs.dimensions:
        return False
    return not (ours.hertz and theirs.angle) and not (theirs.hertz and ours.angle)


def _convert(value: Real, source: Unit, target: Unit) -> Real:
    """A value in ``source`` as a value in ``target``."""
    converted = _scaled(value, Fraction(source.factor) / Fraction(target.factor)) if target.factor else value
    if source.offset == target.offset:
        return converted
    shift = (Fraction(source.offset) - Fraction(target.offset)) / Fraction(target.factor)
    return (
        converted + shift
        if isinstance(converted, Fraction)
        else converted + context().mpf(shift.numerator) / shift.denominator
    )


def _scaled(value: Real, ratio: Fraction) -> Real:
    return value * ratio if isinstance(value, Fraction) else value * ratio.numerator / ratio.denominator
