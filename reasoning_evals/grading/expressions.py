r"""Grades expressions (equal as formulas, in whatever form) and quantities (a number with a unit).

Expressions: first our own grammar, exact and quick, in this process: numbers, algebra, elementary functions, tuples, sets,
intervals, matrices, equations, inequalities. Only what it cannot read, and sympy may (integrals, sums, derivatives, set
operations), goes to a worker process that can be killed.

Quantities: compared after conversion to the target's unit, within a relative tolerance.
"""

from __future__ import annotations

import re
from fractions import Fraction

from reasoning_evals.grading.evaluate import context
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.numbers import Amount, Real, close, read_amount, show, tolerance_of, within
from reasoning_evals.grading.records import MAX_CHARS, TooLarge, Unreadable, Verdict, bad_target, correct, short, wrong
from reasoning_evals.grading.structure import letters, parse_answer, same_answer
from reasoning_evals.grading.units import Unit, parse_unit, unit_surface
from reasoning_evals.grading.workers import WorkerFailed, WorkerPool, WorkerTimeout, shared_pool
from reasoning_evals.problems import Problem

ROUNDING = Fraction(1, 10**12)
"""Relative error that the conversion of a unit may add to an exact comparison."""

_FOR_SYMPY = re.compile(
    r"\\(?:int|iint|iiint|oint|sum|prod|lim|partial|mathbb|cap|cup|setminus|in|notin|emptyset|varnothing|mid|det|max|min|gcd|lcm|pmod|bmod|"
    r"begin|overline|bar|dbinom|tbinom|leq|geq|neq|exists|forall|subset|Re|Im|arg)(?![a-zA-Z])|\\[\{|]|[<>]|\\frac\s*\{\s*d"
)
_RATIONAL = re.compile(r"[+-]?\d{1,300}(?:/0*[1-9]\d{0,300})?")
_WORDS_BEHIND = re.compile(r"(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\s*\d\s*\}?)?|\s*\^\\circ)+\s*$")
_UNIT_TEXT = re.compile(r"\d[\s}]*(?:\\text\s*\{|\\mu\s*\\text|\^\\circ)|\d\s+[a-zA-Z]+(?:/[a-zA-Z]+)?(?:\^?\d)?$")


def grade_quantity(problem: Problem, answer: str) -> Verdict:
    """Correct when the amounts agree in one unit.

    The target's unit is in the target or in ``problem.unit``. An answer without a unit is taken to be in that unit, and the
    reason says so. Another dimension or an unknown unit is wrong, and the reason begins with "unit". Hertz count cycles and
    never match radians per second.
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
        return _quantity_verdict(amount.value, target.value, tolerance, half, surface, surface)
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
        verdict = _quantity_verdict(amount.value, target.value, tolerance, half, surface, "")
    else:
        value = _convert(amount.value, readings[0], targets[0])
        verdict = _quantity_verdict(
            value, target.value, max(tolerance, ROUNDING), half, unit_surface(clean(target_unit)), ""
        )
    if verdict.outcome == "correct":
        return verdict if not surface else correct(f"{verdict.reason}; no unit given, taken as {surface}")
    pure = next((unit for unit in targets if not unit.dimensions and not unit.hertz and unit.factor != 1), None)
    if pure is not None and target.value != 0:  # 0.5 for 50 %, 0.52 for 30 degrees
        converted = _scaled(amount.value, 1 / Fraction(pure.factor))
        if close(converted, target.value, max(tolerance, ROUNDING), half):
            return correct(f"equal {within(tolerance, half)}; no unit given, taken as a pure number")
    return verdict


def _quantity_verdict(
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


def grade_expression(
    problem: Problem, answer: str, limit: float, pool: WorkerPool | None = None, in_process: bool = False
) -> Verdict:
    """The verdict on one expression; ``limit`` is the worker's time in seconds.

    ``in_process``: use no worker; what only a worker could read is then wrong, and the reason says so.
    """
    if len(answer) > MAX_CHARS:
        return wrong(f"answer of {len(answer)} characters is longer than {MAX_CHARS}")
    target, given = clean(problem.target), clean(answer)
    if target.replace(" ", "") == given.replace(" ", ""):
        return correct("the same formula")
    if _RATIONAL.fullmatch(target) and _RATIONAL.fullmatch(given):  # short and frequent
        return _verdict(Fraction(target) == Fraction(given), target, given)
    if verdict := _as_quantity(problem, target, given):
        return verdict
    try:
        wanted = parse_answer(target)
        if wanted.kind == "words":
            return _verdict(wanted.text == letters(given), target, given)
        if same_answer(wanted, parse_answer(given)):
            return _verdict(True, target, given)
    except TooLarge as error:
        return wrong(str(error))
    except Unreadable as error:
        if verdict := _without_words(target, given):
            return verdict
        return _by_worker(target, given, str(error), limit, None if in_process else pool or shared_pool())
    return _without_words(target, given) or _verdict(False, target, given)


def _without_words(target: str, given: str) -> Verdict | None:
    """Units, degrees and words after an answer are dropped where the target has none, and the reason says so."""
    bare = _WORDS_BEHIND.sub("", given)
    if bare == given or not bare or _WORDS_BEHIND.search(target):
        return None
    try:
        same = same_answer(parse_answer(target), parse_answer(bare))
    except Unreadable:
        return None
    return correct(f"equal formulas, {short(given[len(bare) :])!r} left out") if same else None


def _verdict(same: bool, target: str, given: str) -> Verdict:
    return correct("equal formulas") if same else wrong(f"{short(given)!r} is not equal to {short(target)!r}")


def _as_quantity(problem: Problem, target: str, given: str) -> Verdict | None:
    """Compare a target with a unit as an exact quantity: 5 km is not 5 m, and 1000 m is 1 km."""
    if not _UNIT_TEXT.search(target) or "," in target:
        return None
    try:
        amount = read_amount(target)
        if not amount.rest or not parse_unit(amount.rest):
            return None
        theirs = read_amount(given)
    except Unreadable:
        return None
    exact = Problem(problem.problem_id, problem.prompt, problem.target, "quantity", tolerance=1e-6)
    verdict = compare_amounts(exact, amount, amount.rest, theirs)
    marked = "\\text" in target or "\\circ" in target
    return verdict if marked or verdict.outcome == "correct" else None


def _by_worker(target: str, given: str, why: str, limit: float, pool: WorkerPool | None) -> Verdict:
    if not _FOR_SYMPY.search(target) and not _FOR_SYMPY.search(given):
        return _unread_by_both(target, why)
    if pool is None:
        return wrong(f"{why}; not tried in a worker")
    try:
        reply = pool.call({"target": target, "answer": given}, limit)
    except WorkerTimeout as error:
        return Verdict("grader_timeout", str(error))
    except WorkerFailed as error:
        return Verdict("grader_error", str(error))
    if reply["verdict"] == "target":
        return bad_target(f"{short(target)!r} cannot be read: {reply['detail']}")
    if reply["verdict"] == "answer":
        return wrong(f"{short(given)!r} cannot be read: {reply['detail']}")
    if reply["verdict"] == "same":
        return correct("equal formulas (sympy)")
    return wrong(f"{short(given)!r} is not equal to {short(target)!r} (sympy)")


def _unread_by_both(target: str, why: str) -> Verdict:
    try:
        same_answer(parse_answer(target), parse_answer(target))
    except Unreadable as error:
        return bad_target(f"{short(target)!r} cannot be read: {error}")
    return wrong(why)
