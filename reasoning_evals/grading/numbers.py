"""Grades integers and numbers: reads one number from an answer and compares it within a relative tolerance.

Integers are compared as integers: 025 is 25, 25.0 is 25, 24.9999 is not. A number is read with the text that follows it (a
unit, words), so that graders of quantities can use the same reader.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from reasoning_evals.grading.evaluate import context, number
from reasoning_evals.grading.formula import read_number
from reasoning_evals.grading.latex import clean, top_level
from reasoning_evals.grading.records import TooLarge, Unreadable, Verdict, bad_target, check_size, correct, short, wrong
from reasoning_evals.grading.units import known_unit, parse_unit
from reasoning_evals.problems import Problem

MAX_INEXACT = 10**30
"""Integers beyond this are compared only where they are computed exactly."""

DEFAULT_TOLERANCE = Fraction(1, 100)
"""Relative tolerance of a number or quantity when the problem gives none."""
WIDEST = Fraction(1, 20)
"""Upper limit of the tolerance that a rounded target's last digit may give."""
Real = Any
"""A Fraction, or a 40-digit number of ``evaluate.context()``."""
_PLAIN = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+)(\.\d+)?(?= |$|[a-zA-Z%°])(?!e[+-]?\d)(?!E[+-]?\d)")
_RELATION = re.compile(
    r"\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\propto(?![a-zA-Z])|(?<![<>!:])=|\\to(?![a-zA-Z])"
)
_ABOUT = re.compile(
    r"^(?:\\text\s*\{\s*)?(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)?|about|approximately|approx\.?|roughly|around|nearly|almost|"
    r"is|only|just|a total of|exactly)(?![a-zA-Z])\s*:?\s*\}?\s*|^\\text\s*\{[^{}\d]*\}\s*:?\s*(?=[-+\d.\\])",
    re.IGNORECASE,
)
_UNCERTAINTY = re.compile(r"\\pm\s*[\d.]+(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{[^{}]*\}|-?\d))?")
_DIGITS = re.compile(
    r"[+-]?\s*(\d[\d, ]*)(?:\.(\d+))?(?:[eE]([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([+-]?\s*\d{1,4})\s*\}?)?\s*$"
)
_WORDS_ONLY = re.compile(
    r"[\s,.;:()'\"-]*(?:\\text\s*\{[^{}\d=+]*\}[\s,.;:()-]*|[A-Za-z]{3,}[\s,.;:()'-]*|(?:of|in|to|at|by|is|a|an|up)\b[\s,.;]*)*$"
)
_RANGE = re.compile(r"\d+(?:\.\d+)?\s*-\s*\d+(?:\.\d+)?(?:\s*(?:\\text|[a-zA-Z%])|\s*$)")
_COMMON_LETTERS = set("msghLNJWVKCATHF")


def grade_integer(problem: Problem, answer: str) -> Verdict:
    """Correct when the answer states the target and nothing else; units and words around it are ignored."""
    target = int(problem.target)
    if answer == problem.target:
        return correct("the same integer")
    try:
        amount = read_amount(answer)
    except Unreadable as error:
        return wrong(f"not an integer: {error}")
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
    if value.denominator != 1:
        return wrong(f"{_decimal(value)} is not an integer")
    if value == target:
        return correct("the same integer" + (f", {short(amount.rest)!r} left out" if amount.rest else ""))
    return wrong(f"{short(int(value)) if abs(value) < 10**60 else 'a larger number'} is not {target}")


def _decimal(value: Fraction) -> str:
    return f"{float(value):g}" if abs(value) < 10**300 else "the number"


class Amount(NamedTuple):
    """One number as written."""

    value: Real
    rest: str
    """The text after the number, in normal form: a unit, words, or nothing."""
    half_digit: Fraction | None
    """Half a unit of the last digit of a decimal numeral, None for whole numbers and formulas."""
    plain: bool
    """Only a numeral: digits, a sign, a point."""


@lru_cache(maxsize=8192)
def read_amount(text: str, log_base: int | None = None) -> Amount:
    """The number that a text states, after its last ``=`` or ``≈``.

    ``v = 5.0 m/s`` is 5 with the rest ``m/s``; an uncertainty (``5.0 ± 0.1``) is left out. Raises Unreadable where the text
    is not one number: symbols, several values, a range.
    """
    surface = clean(check_size(text))
    match = _PLAIN.match(surface)
    if match and match.end() == len(surface):
        return _plain_amount(match)
    if _says_more(surface):
        raise Unreadable("more than one number")
    sides = _sides(surface)
    # "5 = x" states 5 too, "E = mc^2" states no number
    side = sides[-1] if _is_number_like(sides[-1]) or len(sides) == 1 else sides[-2]
    return _read_side(side, log_base)


def is_remark(rest: str) -> bool:
    """Whether the text after a number does not change its value: a unit or words, not more mathematics."""
    rest = rest.strip()
    if not rest or _WORDS_ONLY.match(rest):
        return True
    if re.fullmatch(r"[A-Za-z]", rest) and rest not in _COMMON_LETTERS:
        return False
    return known_unit(rest)


def close(value: Real, target: Real, tolerance: Fraction, half_digit: Fraction | None = None) -> bool:
    """|value - target| <= max(tolerance * |target|, half a unit of the target's last digit), at most WIDEST * |target|.

    The tolerance is relative at every magnitude. A target of 0 accepts 0 and what rounds to it.
    """
    margin = tolerance * abs(target)
    if half_digit is not None:
        margin = max(margin, min(half_digit, WIDEST * abs(target)) if target != 0 else half_digit)
    if isinstance(value, Fraction) and isinstance(target, Fraction):
        return abs(value - target) <= margin
    # both sides have 40 digits: equal numbers may differ by rounding
    size = max(abs(_float(value)), abs(_float(target)))
    return bool(abs(_float(value) - _float(target)) <= _float(margin) + size * context().mpf(10) ** -30)


def _float(value: Real) -> Any:
    ctx = context()
    return ctx.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else ctx.mpf(value)


def _plain_amount(match: re.Match[str]) -> Amount:
    sign, digits, decimals = match.groups()
    if len(match.group()) > 1000:
        raise TooLarge("a numeral is longer than 1000 digits")
    value = Fraction(sign + digits.replace(",", "") + (decimals or ""))
    half = Fraction(1, 2 * 10 ** (len(decimals) - 1)) if decimals else None
    return Amount(value, "", half, True)


def _says_more(surface: str) -> bool:
    """Whether a comma or semicolon (not a thousands separator) divides the text into several statements or numbers."""
    if not ("," in surface or ";" in surface or "\\text" in surface):
        return False
    marked = re.sub(r",(?=\d{3}(?!\d))", "", re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}", ";", surface))
    others = top_level(marked, ",;")[1:]
    return any(_RELATION.search(other) or re.match(r"[-+]?\s*(?:\d|\\frac|\\sqrt|\\pi)", other) for other in others)


def _sides(surface: str) -> list[str]:
    """The parts between relation signs outside brackets, without blanks and "about"."""
    marked = _RELATION.sub("\x00", surface)
    sides = [_ABOUT.sub("", side.strip().lstrip("~ ")) for side in top_level(marked, "\x00")]
    return [side for side in sides if side] or [surface]


def _is_number_like(side: str) -> bool:
    return bool(re.match(r"[-+(\s{|]*(?:\d|\.\d|\\(?:frac|sqrt|pi|ln|log|sin|cos|tan|exp|binom|arc|pm)|e\^)", side))


def _read_side(side: str, log_base: int | None) -> Amount:
    if re.match(r"\s*\\(?:pm|mp)(?![a-zA-Z])", side):
        raise Unreadable("two values (plus or minus)")
    if _RANGE.match(side):
        raise Unreadable("a range")
    side = re.sub(r"^\(\s*([^()]*?)\s*\\pm[^()]*\)", r"\1", side)
    match = _PLAIN.match(side)
    if match and re.match(r"\s+[a-zA-Z]|\s*(?:\\text|\\mu|\\Omega|\\%|%|\^\\circ)|$", side[match.end() :]):
        amount = _plain_amount(match)
        end = match.end()
    else:
        reading = read_number(side, log_base)
        end = reading.end
        amount = Amount(number(reading.tree), "", _half_digit(side[:end]), False)
    rest = _UNCERTAINTY.sub("", side[end:]).strip()
    rest = rest[1:-1].strip() if re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]", rest) else rest
    if re.match(r"[-+*/^<>]\s*[\d\\a-zA-Z(]", rest) and not rest.startswith(("/", "^\\circ", "*")):
        raise Unreadable(f"not one number: {rest[:30]!r} follows")
    if re.match(r"(?:,|;|\\text\s*\{\s*(?:and|or|to)\b|and\b|or\b|to\b)[^a-zA-Z]*[-+]?[\d.\\]*\d", rest):
        raise Unreadable("more than one number")
    return amount._replace(rest=rest)


def _half_digit(numeral: str) -> Fraction | None:
    """Half a unit of the last digit of ``1.60 \\times 10^{-19}``; None for whole numbers and formulas."""
    match = _DIGITS.match(numeral.strip())
    if not match or not (match[2] or match[3] or match[4]):
        return None
    exponent = int((match[3] or match[4] or "0").replace(" ", ""))
    return Fraction(1, 2) * Fraction(10) ** (exponent - len(match[2] or ""))


def grade_number(problem: Problem, answer: str) -> Verdict:
    """Correct within the problem's tolerance.

    Without one: two whole numbers must be equal; otherwise 1 %, widened to half a unit in the last digit of a rounded
    target. A percentage is read both ways, 50 % as 50 and as 0.5.
    """
    try:
        target = read_amount(problem.target)
    except Unreadable as error:
        return bad_target(error)
    if not is_remark(target.rest):
        return bad_target(f"{short(problem.target)!r} is not a number")
    try:
        amount = read_amount(answer)
    except Unreadable as error:
        return wrong(f"not a number: {error}")
    if not is_remark(amount.rest):
        return wrong(f"not a number: {short(amount.rest)!r} follows it")
    tolerance, half = tolerance_of(problem, target, amount)
    if close(amount.value, target.value, tolerance, half):
        return correct(
            f"equal {within(tolerance, half)}" + (f", {short(amount.rest)!r} left out" if amount.rest else "")
        )
    if _is_percent(amount) != _is_percent(target):
        rescaled = amount.value / 100 if _is_percent(amount) else amount.value * 100
        if close(rescaled, target.value, tolerance, half):
            return correct(f"equal as a percentage {within(tolerance, half)}")
    if amount.rest.startswith("^\\circ") and not target.rest:  # 90 degrees for pi/2
        radians = parse_unit(amount.rest)
        if (
            radians
            and radians[0].angle
            and close(amount.value * Fraction(radians[0].factor), target.value, tolerance, half)
        ):
            return correct(f"equal in radians {within(tolerance, half)}")
    return wrong(f"{show(amount.value)} is not {show(target.value)} {within(tolerance, half)}")


def tolerance_of(problem: Problem, target: Amount, amount: Amount) -> tuple[Fraction, Fraction | None]:
    """(relative tolerance, half a digit of the target): the problem's own, or the default for how the numbers are written."""
    if problem.tolerance is not None:
        return Fraction(problem.tolerance).limit_denominator(10**12), None
    whole = target.plain and amount.plain and target.half_digit is None and amount.half_digit is None
    if whole and problem.answer_type == "number":
        return Fraction(0), None
    return DEFAULT_TOLERANCE, target.half_digit


def within(tolerance: Fraction, half: Fraction | None) -> str:
    """The tolerance in words, for a reason."""
    if tolerance == 0:
        return "exactly"
    return f"within {float(tolerance * 100):g} %" + (" or half of the target's last digit" if half is not None else "")


def show(value: Real) -> str:
    """A number as text, for a reason."""
    if isinstance(value, Fraction) and value.denominator == 1 and abs(value) < 10**15:
        return str(int(value))
    ctx = context()
    approximate = ctx.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value
    return str(ctx.nstr(approximate, 6))


def _is_percent(amount: Amount) -> bool:
    return amount.rest.lstrip("\\").startswith(("%", "text{percent", "text{%", "text{ percent", "percent"))
