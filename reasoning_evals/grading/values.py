"""Grades what needs no algebra: choices (letters, True and False), integers, numbers and quantities.

Integers are compared as integers: 025 is 25, 25.0 is 25, 24.9999 is not. Quantities are compared after conversion to the
target's unit.
"""

from __future__ import annotations

import re
from fractions import Fraction

from reasoning_evals.grading.evaluate import context
from reasoning_evals.grading.identity import same_answer
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.numbers import (
    DEFAULT_TOLERANCE,
    Amount,
    Real,
    close,
    floating,
    is_remark,
    read_amount,
    scaled,
)
from reasoning_evals.grading.records import MAX_CHARS, Unreadable, Verdict, bad_target, correct, short, wrong
from reasoning_evals.grading.structure import parse_answer
from reasoning_evals.grading.units import Unit, parse_unit, unit_surface
from reasoning_evals.problems import Problem

_TRUTH = {"true": "True", "yes": "True", "correct": "True", "false": "False", "no": "False", "incorrect": "False"}
_MARKS = re.compile(r"\\text\s*|\\mathbf\s*|\\underline\s*|[{}*$\"`\\]|(?<![a-zA-Z])'|'(?![a-zA-Z])")
_LEAD = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:option|opt(?=\.)|choice|letter|answer)\b\.?\s*(?:is\b)?[\s:]*|^(?:la|le|el|die|der)\s+(?=\(?[A-J]\)?[.\s]*$)|^[^\W\d_a-zA-Z]{1,6}\s*:?\s*(?=[(A-J])",
    re.I,
)
_LETTER = re.compile(r"^[(\[]?\s*(?:([A-Ja-j])\s*(?:[)\].:,;!]|$|\s+(?=-)|(?<=\s)(?=\())|([A-J])(?=\s*=\s*[-+\d]))")
_DENIED = re.compile(
    r"\W*(?:\\text\W*)?(?:not|never|neither|nor)\b|\W*(?:не(?!\w)|[^\W\d_a-zA-Z]{0,6}?(?:[不非错否]|排除|除了))", re.I
)
_VECTOR = re.compile(
    r"\W*(?:\\[a-z]+\s*\{\s*)*\\(?:(?:vec|hat|dot|bar|overrightarrow)(?![a-zA-Z])\s*\{?\s*[A-Ja-j](?![a-zA-Z])"
    r"|boldsymbol\s*\{?\s*[A-Ja-j]\s*\}?\s*=)"
)
"""The letter is a vector, not an option."""
_UPPER_WORD = re.compile(r"^([A-HJ])\s+[^\s=<>^_+*/]")
_SECOND = re.compile(
    r"^[\s)\].:]*(?:,|;|/|&|and\b|or\b|cup\b|cap\b|lor\b|land\b)\s*\(?[A-J]\s*(?:[),.;]|$)|^\s*\)?\s*(?:or|and|but|nor|&)(?![a-zA-Z])|^\s*(?:not|if|unless|[A-J]\s*$)\b"
    r"|^[\s).,]*(?:is|was|seems|looks)\s*(?:(?:to be|clearly|definitely|the|an?)\s+)*(?:not|n't|never|wrong|incorrect|false|impossible|eliminated"
    r"|excluded|ruled|rejected|discarded|unlikely|invalid|worst|out\b|least\s+(?:likely|plausible|correct|suitable))(?![a-z])"
    r"|^\s*(?:cannot|can't|isn't|wasn't)(?![a-z])|^\s*是?[错不非误]|^\s*被?排除|(?<!not )(?<!than )(?<!\w)\(\s*[A-J]\s*\)"
)
"""Behind a letter: another letter, an alternative or a denial."""
_NONE = re.compile(r"(?i)(?:\\text\s*\{)?\s*(?:there (?:are|is) )?(?:none|nothing)\s*\}?")
MAX_INEXACT = 10**30
"""Integers beyond this are compared only where they are computed exactly."""
ROUNDING = Fraction(1, 10**12)
"""Relative error that the conversion of a unit may add to an exact comparison."""


def grade_choice(problem: Problem, answer: str) -> Verdict:
    """Correct when the answer names the target's letter, alone or before the option's text."""
    wanted = read_choice(problem.target)
    if wanted is None:
        return bad_target(f"{short(problem.target)!r} is neither an option letter nor True or False")
    given = _article(problem.prompt, answer) or read_choice(answer)
    if given is None:
        return wrong(f"no single option in {short(answer)!r}")
    return correct("the same option") if given == wanted else wrong(f"{given} is not {wanted}")


def _article(prompt: str, answer: str) -> str | None:
    """The letter of the option given word for word, where its text begins with the article A: "A larger mass" may be option C."""
    words = _MARKS.sub("", clean(answer[:MAX_CHARS])).strip(" .").split()
    if len(words) < 2 or words[0] != "A":
        return None
    text = r"\s+".join(map(re.escape, words))
    letters = set(re.findall(rf"^\W*([A-J])\W*[).:\]]\W*{text}\W*$", prompt, re.M))
    return letters.pop() if len(letters) == 1 else None


def read_choice(text: str) -> str | None:
    """The capital letter, "True" or "False" that a text states; None for none, for several, and for one that is denied."""
    surface = _LEAD.sub("", _MARKS.sub("", clean(text[:MAX_CHARS])).strip())
    word = surface.strip(" .!()").lower()
    if (said := word.removeprefix("not ")) in _TRUTH:
        return _TRUTH[said] if said == word else "False" if _TRUTH[said] == "True" else "True"
    if first := re.match(r"(?i)(yes|no|true|false)\s*[,.;:]\s(?!.*\b(?:yes|no|not|true|false)\b|.*n't)", surface):
        return _TRUTH[first[1].lower()]
    if _VECTOR.match(text) or _DENIED.match(text):
        return None
    match = _LETTER.match(surface) or _UPPER_WORD.match(surface)
    if not match or _SECOND.search(surface[match.end(match.lastindex or 0) :]):
        return None
    return match[match.lastindex or 0].upper()


def grade_integer(problem: Problem, answer: str) -> Verdict:
    """Correct when the answer states the target and nothing else; units and words around it are ignored."""
    target = int(problem.target)
    if target == 0 and _NONE.fullmatch(clean(answer)):
        return correct("the same integer, in words")
    try:
        amount = read_amount(answer, local=True).as_asked(problem)
    except Unreadable as error:
        return wrong(f"not an integer: {error}")
    if amount.comma or re.search(r"\\pm(?![a-zA-Z])", clean(answer)):
        return wrong("not an integer: two values, or one that is uncertain")
    if _is_percent(amount) and not asks_percent(problem, r"\brates?\b|probability|chances?\b"):
        return wrong("a percentage, which the question does not ask for")
    if not is_remark(amount.rest):
        return wrong(f"not an integer: {short(amount.rest)!r} follows the number")
    value = amount.value
    if not isinstance(value, Fraction):
        if abs(value) > MAX_INEXACT:
            return wrong("too large to be compared exactly")
        nearest = int(context().nint(value))
        if abs(value - nearest) > abs(value) * context().mpf(10) ** -30:
            return wrong("not an integer")
        value = Fraction(nearest)
    if value == target:
        return correct("the same integer" + (f", {short(amount.rest)!r} left out" if amount.rest else ""))
    return wrong(f"{show(value)} is not {target}")


def grade_number(problem: Problem, answer: str) -> Verdict:
    """Correct within the problem's tolerance.

    Without one: two whole numbers must be equal; otherwise 1 %, widened to half a unit in the last digit of a rounded
    target. A percentage is its hundredth, 50 % is 0.5; where the question or the target is in percent it is 50 too.
    """
    try:
        target = read_amount(problem.target)
    except Unreadable as error:
        return bad_target(error)
    if not is_remark(target.rest):
        return bad_target(f"{short(problem.target)!r} is not a number")
    try:
        amount = read_amount(answer, local=True).as_asked(problem)
    except Unreadable as error:
        return wrong(f"not a number: {error}")
    if not is_remark(amount.rest):
        return wrong(f"not a number: {short(amount.rest)!r} follows it")
    tolerance, half = tolerance_of(problem, target, amount)
    only_rescaled = _is_percent(amount) and not _is_percent(target) and not asks_percent(problem)
    if close(amount.value, target.value, tolerance, half) and not only_rescaled:
        return correct(
            f"equal {within(tolerance, half)}" + (f", {short(amount.rest)!r} left out" if amount.rest else "")
        )
    if _is_percent(amount) != _is_percent(target):
        rescaled = amount.value / 100 if _is_percent(amount) else amount.value * 100
        if close(rescaled, target.value, tolerance, half):
            return correct(f"equal as a percentage {within(tolerance, half)}")
    radians = parse_unit(amount.rest) if amount.rest and not target.rest else ()  # 90 degrees for pi/2
    angle = radians[0] if radians and radians[0].angle == 1 else None
    if angle and close(scaled(amount.value, Fraction(angle.factor)), target.value, tolerance, half):
        return correct(f"equal in radians {within(tolerance, half)}")
    return wrong(f"{show(amount.value)} is not {show(target.value)} {within(tolerance, half)}")


def tolerance_of(problem: Problem, target: Amount, amount: Amount) -> tuple[Fraction, Fraction | None]:
    """(relative tolerance, half a digit of the target): the problem's own, or the default for how the numbers are written."""
    if problem.tolerance is not None:
        return Fraction(problem.tolerance).limit_denominator(10**12), None
    whole = target.plain and amount.plain and target.half_digit is None and (amount.half_digit is None or amount.comma)
    if whole and (problem.answer_type == "number" or amount.comma):
        return Fraction(0), None
    gap = 1 - abs(floating(target.value))  # of 0.999 c the distance from 1 matters
    near_one = 0 < gap < float(DEFAULT_TOLERANCE) and (target.rest or problem.unit or "").strip() in ("", "c")
    return DEFAULT_TOLERANCE * (Fraction(float(gap)) if near_one else 1), target.half_digit


def within(tolerance: Fraction, half: Fraction | None) -> str:
    """The tolerance in words, for a reason."""
    if tolerance == 0:
        return "exactly"
    return f"within {float(tolerance * 100):g} %" + (" or half of the target's last digit" if half is not None else "")


def show(value: Real) -> str:
    """A number as text, for a reason."""
    if isinstance(value, Fraction) and value.denominator == 1 and abs(value) < 10**15:
        return str(int(value))
    return str(context().nstr(floating(value), 6))


def asks_percent(problem: Problem, others: str = "%") -> bool:
    """Whether a question or its unit is about percent, or about what ``others`` names."""
    return bool(re.search(rf"percent|per cent|%|{others}", f"{problem.prompt} {problem.unit}", re.IGNORECASE))


def _is_percent(amount: Amount) -> bool:
    return bool(re.match(r"[\s\\]*(?:text\s*\{)?\s*\\?(?:%|per\s?cent|pct)", amount.rest, re.IGNORECASE))


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
        amount = read_amount(answer, local=True).as_asked(problem)
    except Unreadable as error:
        return _as_formula(problem.target, answer) or wrong(f"not a quantity: {error}")
    return compare_amounts(problem, target, target.rest or problem.unit or "", amount)


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
        converted = scaled(amount.value, 1 / Fraction(pure.factor))
        if close(converted, target.value, max(tolerance, ROUNDING), half):
            return correct(f"equal {within(tolerance, half)}; no unit given, taken as a pure number")
    return verdict


def _quantity_verdict(
    value: Real, target: Real, tolerance: Fraction, half: Fraction | None, unit: str, answer_unit: str
) -> Verdict:
    if close(value, target, tolerance, half):
        return correct(f"equal {within(tolerance, half)}")
    given, wanted = f"{show(value)} {answer_unit}".strip(), f"{show(target)} {unit}".rstrip()
    return wrong(f"{given} is not {wanted} {within(tolerance, half)}")


def _comparable(ours: Unit, theirs: Unit) -> bool:
    if ours.dimensions != theirs.dimensions:
        return False
    return not (ours.hertz and theirs.angle) and not (theirs.hertz and ours.angle)


def _convert(value: Real, source: Unit, target: Unit) -> Real:
    """A value in ``source`` as a value in ``target``."""
    converted = scaled(value, Fraction(source.factor) / Fraction(target.factor)) if target.factor else value
    shift = (Fraction(source.offset) - Fraction(target.offset)) / Fraction(target.factor)
    return converted + (shift if isinstance(converted, Fraction) else floating(shift))


GRADERS = {"integer": grade_integer, "number": grade_number, "quantity": grade_quantity, "choice": grade_choice}
