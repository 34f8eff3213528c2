"""Reads the one number that an answer states, with the text that follows it: a unit, or words that change nothing.

What does change it makes the text unreadable: a second number, another value of the same (43 = 42), "is wrong".
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from reasoning_evals.grading.characters import without_modulus
from reasoning_evals.grading.evaluate import context, number
from reasoning_evals.grading.formula import read_number
from reasoning_evals.grading.latex import clean, unwrap
from reasoning_evals.grading.records import Contradiction, Unreadable, check_size, short, top_level
from reasoning_evals.grading.structure import DENIAL
from reasoning_evals.grading.units import known_unit, parse_unit
from reasoning_evals.problems import Problem

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
    r"is|only|just|a total of|exactly|US|USD|EUR|GBP|INR|CNY|RMB|JPY|Rs\.?)(?![a-zA-Z])\s*:?\s*\}?\s*:?\s*|^\\text\s*\{[^{}\d]*\}\s*:?\s*(?=[-+\d.\\])",
    re.IGNORECASE,
)
_UNCERTAINTY = re.compile(r"\\pm\s*[\d.]+(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{[^{}]*\}|-?\d))?")
_ROUNDED_TO = re.compile(
    r"\(?\s*(?:\\text\s*\{\s*)?\(?(?:correct(?:ed)?\s+|rounded\s+)?to\s*\}?\s*\d\s*(?:\\text\s*\{)?\s*(?:s\.?\s?f|sig|d\.?\s?p|decimal)[^(){}]*[)}]*"
)
_DIGITS = re.compile(
    r"[+-]?\s*(\d[\d, ]*)(?:\.(\d+))?(?:[eE]([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([+-]?\s*\d{1,4})\s*\}?)?\s*$"
)
_WORDS_ONLY = re.compile(
    r"[\s,.;:()'\"-]*(?:\\text\s*\{[^{}\d=+]*\}[\s,.;:()-]*|(?:[^\W\d_]{3,}|[^\W\d_a-zA-Z]{1,2})(?![^\W\d_])[\s,.;:()'-]*"
    r"|(?:of|in|to|at|by|is|a|an|up|US)\b[\s,.;]*)*$"
)
_CHANGE = re.compile(
    r"(?<![a-zA-Z\\])(?:plus|minus|factorial|twice|thrice|doubled|halved|and\s+(?:a|one|two|three)\s+(?:hal(?:f|ves)|thirds?|quarters?))(?![a-zA-Z])"
    r"|^(?:\\text\s*\{\s*)?(?:and\s+)?(?:squared|cubed|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|halves|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?)(?![a-zA-Z])"
    r"|^\s*(?:[만억천]|이[상하]|미만)|以[上下]|(?<![a-zA-Z])(?:mil(?:le|li?ard\w*|lion\w{2,}|lones)|tausend|тысяч\w*|миллион\w*)(?![a-zA-Z])"
    r"|千(?![克米瓦卡])|[万萬億亿百十兆半倍零一二三四五六七八九两几]|\?|^\s*[-*/+]\s*$",
    re.IGNORECASE,
)
"""Behind a number, what changes its value or doubts it: number words in some languages, "and a half", "squared", a question mark."""
_BOUND = re.compile(
    r"(?<![a-zA-Z])(?:at\s+(?:least|most)|(?:less|more|fewer|greater|larger|smaller|higher|lower)\s+than|up\s+to)(?![a-zA-Z])(?:[\s{}()$:+-]|\\(?!text)[a-zA-Z]+)*$",
    re.IGNORECASE,
)
"""Directly before a number: a bound, not a value."""
_GROUPED = re.compile(
    r"(?<![\d.,'])(?:\d{1,3}(?:'\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:[. ]\d{3})+(?=,\d+(?![\d.,]))|\d{1,3}(?: \d{3})+(?=\.\d+(?![\d.,])))"
    r"(?![\d']|[.,]\d{3})"
)
"""1'000, 10,00,000, 1.000.000 and, before a decimal comma, 1.000 and 1 000."""
DECIMAL_COMMA = re.compile(r"(?<![\d.,(\[{])(\d+),((?<=(?<!\d)0,)\d{3}|\d{1,2}|\d{4,})(?![\d,])")
_POINTS = re.compile(r"(?<![\d.,])\d{1,3}\.000(?![\d.])|(?<![\d.,(\[])\d+,\d\d?(?![\d,])")
"""In a question: points between thousands, or decimal commas."""
_IN_BRACKETS = re.compile(r"(?:[(\[]|\\\{)[^()\[\]{}]*\d,\d|^\{[^{}]*\d,\d")
_SCALE = re.compile(
    r"(?:\\text\s*\{\s*)?(dozen|hundred|thousand|million|billion|trillion|lakh|crore|[万萬만亿億억])s?(?![a-zA-Z])\s*\}?",
    re.IGNORECASE,
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
           "trillion": 10**12, "万": 10**4, "萬": 10**4, "만": 10**4, "亿": 10**8, "億": 10**8, "억": 10**8}  # fmt: skip
_CONDITION = re.compile(
    r"[\s,(]*(\\text\s*\{(?:[^{}]*?[^{}a-zA-Z])?)?(?<![a-zA-Z])(?:at|when|for|if|where|with)[\s}]*\\?[a-zA-Z]\w*(?:_\{\w+\})?\s*=(?!.*(?:otherwise|else))[^=]*$"
)
"""Behind an answer: 5 m/s at t = 2 s."""
_EXPONENT = re.compile(
    r"\^\s*(?:\{[^{}]*\}|\([^()]*\)|[+-]?\s*\d+(?:/\d+)?)|_\s*(?:\{[^{}]*\}|\w)|(?<=[a-zA-Z])[+-]?\d+"
    r"|(?<![\d.])1(?=\s*/\s*\\?[a-zA-Z{])|\\frac\s*\{\s*1\s*\}|^(?:\\times\s*)?10(?=\s*\^)"
)
_UNDER = re.compile(r"(?<![a-zA-Z])(?:at|when|for|with|after|from|to|above|below|under|in|of|directed)(?![a-zA-Z])")
_PIECE = re.compile(r"(\d+(?:\.\d+)?)\s*([^\d\s.].*)")
_COMMON_LETTERS = set("msghLNJWVKCATHF")


class Amount(NamedTuple):
    """One number as written."""

    value: Real
    rest: str
    """The text after the number, in normal form: a unit, words, or nothing."""
    half_digit: Fraction | None
    r"""Half a unit of the last digit of ``1.60 \times 10^{-19}``, None for whole numbers and formulas."""
    plain: bool
    """Only a numeral: digits, a sign, a point."""
    scale: str = ""
    """A word that is part of the value: million, dozen."""
    comma: bool = False
    """Written with a decimal comma: 3,14 could be two numbers, and is one only where it is the target's."""

    def as_asked(self, problem: Problem) -> Amount:
        """42 dozen are 42 where the question asks for dozens, and 70.000 are 70000 where it writes numbers so."""
        if problem.answer_type == "integer" and self.half_digit == Fraction(1, 2000) and _POINTS.search(problem.prompt):
            return self._replace(value=self.value * 1000) if self.value * 1000 == int(problem.target) else self
        asked = self.scale and self.scale in f"{problem.prompt} {problem.unit}".lower()
        return self._replace(value=scaled(self.value, Fraction(1, _SCALES[self.scale]))) if asked else self


@lru_cache(maxsize=8192)
def read_amount(text: str, log_base: int | None = None, local: bool = False) -> Amount:
    """The number that a text states, after its last ``=`` or ``≈``. ``local``: written with any country's separators.

    ``v = 5.0 m/s`` is 5 with the rest ``m/s``; an uncertainty (``5.0 ± 0.1``) is left out. Raises Unreadable where the text
    is not one number: symbols, several values, a range.
    """
    surface = clean(check_size(text))
    surface = re.sub(r"^\(([^(),;]*)\)$", r"\1", unwrap(surface))
    if local and not _IN_BRACKETS.search(surface):
        grouped = _GROUPED.sub(lambda digits: re.sub(r"\D", "", digits[0]), surface)
        if (plain := DECIMAL_COMMA.sub(r"\1.\2", grouped)) != surface:
            return read_amount(plain, log_base)._replace(comma=plain != grouped == surface)
    surface = without_modulus(surface)
    behind = _CONDITION.search(surface)
    if behind and re.search(r"\d", surface[: behind.start()]):
        surface = surface[: behind.start()] + (behind[1].rstrip(" (") + "}" if behind[1] else "")
    if mixed := _mixed_units(surface):
        return mixed
    if _says_more(surface) or DENIAL.search(surface) or _BOUND.search(re.match(r"\D*", surface)[0]):  # type: ignore[index]
        raise Unreadable("more than one number, or words that take it back")
    sides = _sides(surface)
    # "5 = x" states 5 too, "E = mc^2" states no number
    stated = len(sides) - 1 if _is_number_like(sides[-1]) or len(sides) == 1 else len(sides) - 2
    amount = _read_side(sides[stated], log_base)
    if not re.search(r"\\(?:equiv|propto|to)(?![a-zA-Z])", surface):
        loose = bool(re.search(r"\\(?:approx|sim)(?![a-zA-Z])", surface))
        for side in filter(_is_number_like, sides[:stated]):
            if _contradicts(side, amount, loose, log_base):
                raise Contradiction(f"{side[:30]!r} is not {sides[stated][:30]!r}")
    return amount


def _contradicts(side: str, amount: Amount, loose: bool, log_base: int | None) -> bool:
    """Whether a number that is said to be equal is another one: 43 = 42. Rounding is none: 2/3 = 0.667."""
    try:
        other = _read_side(side, log_base)
    except Unreadable:
        return False
    values = [amount.value]
    if other.rest or amount.rest:
        ours, theirs = parse_unit(amount.rest), parse_unit(other.rest)
        if other.rest and not (ours and theirs and amount.rest and ours[0].dimensions == theirs[0].dimensions):
            return False  # 6k = 42
        if ours and theirs and theirs[0].factor and ours[0].dimensions == theirs[0].dimensions:
            values.append(scaled(amount.value, Fraction(ours[0].factor) / Fraction(theirs[0].factor)))
    whole = amount.plain and other.plain and amount.half_digit is None and other.half_digit is None
    tolerance = WIDEST if loose or len(values) > 1 else Fraction(0) if whole else DEFAULT_TOLERANCE
    near = loose and bool(
        abs(floating(amount.value) - floating(other.value)) <= floating(amount.half_digit or Fraction(1, 2))
    )  # 3.5 is about 4
    return not near and not any(close(other.value, value, tolerance, amount.half_digit) for value in values)


def _mixed_units(surface: str) -> Amount | None:
    """5 h 30 min as 5.5 h: whole numbers of ever smaller units of one kind."""
    flat = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", _sides(surface)[-1]).strip()
    first, *others = re.split(
        r"(?:[\s,]|(?<![a-zA-Z])and(?![a-zA-Z]))+(?=\d)|(?<=')(?=\d)|(?<=\d[a-z])(?=\d+\s*[a-z])|(?<=[a-z]{2})(?=\d+\s*[a-z])",
        flat.lstrip("+- "),
    )
    head = _PIECE.fullmatch(first)
    if not others or not head or len(others) > 3 or "/" in flat:
        return None
    largest = smaller = next(iter(parse_unit(head[2])), None)
    value = Fraction(head[1])
    for piece in others:
        match = _PIECE.fullmatch(piece)
        if not match or not largest or not smaller or not smaller.factor or not (largest.dimensions or largest.angle):
            return None  # 2.5 \cdot 1.2 is a product
        name = "min" if match[2].strip() == "m" and dict(largest.dimensions).keys() == {"[time]"} else match[2]
        unit = next(iter(parse_unit(name)), None)
        if not unit or unit.dimensions != largest.dimensions or unit.offset or unit.factor >= smaller.factor:
            return None
        part = Fraction(match[1]) * Fraction(unit.factor) / Fraction(largest.factor)
        value, smaller = value + part.limit_denominator(10**9), unit
    return Amount(-value if flat.startswith("-") else value, head[2].strip(), None, False)


def scaled(value: Real, ratio: Fraction) -> Real:
    """A value times a ratio."""
    return value * ratio if isinstance(value, Fraction) else value * ratio.numerator / ratio.denominator


def is_remark(rest: str) -> bool:
    """Whether the text after a number does not change its value: a unit or words, not more mathematics."""
    rest = rest.strip()
    if re.match(r"(?:\\text\s*\{\s*)?mil(?![a-zA-Z])", rest):
        return False  # a unit of length, but also a thousand
    letter = re.fullmatch(r"(?:\\text\s*)?[{\s]*([A-Za-z])[\s}]*", rest)
    if letter and letter[1] not in _COMMON_LETTERS:
        return False  # 7k is 7000
    return not rest or bool(_WORDS_ONLY.match(rest)) or known_unit(rest)


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
    size = max(abs(floating(value)), abs(floating(target)))
    return bool(abs(floating(value) - floating(target)) <= floating(margin) + size * context().mpf(10) ** -30)


def floating(value: Real) -> Any:
    """A number with 40 digits."""
    ctx = context()
    return ctx.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else ctx.mpf(value)


def _plain_amount(match: re.Match[str]) -> Amount:
    sign, digits, decimals = match.groups()
    value = Fraction(sign + digits.replace(",", "") + (decimals or ""))
    half = Fraction(1, 2 * 10 ** (len(decimals) - 1)) if decimals else None
    return Amount(value, "", half, True)


def _says_more(surface: str) -> bool:
    """Whether a comma or semicolon (not a thousands separator) divides the text into several statements or numbers."""
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
    side = re.sub(r"^\(\s*([^()]*?)\s*\\pm[^()]*\)", r"\1", side)
    match = _PLAIN.match(side)
    if match and re.match(r"\s+[a-zA-Z]|\s*(?:\\text|\\mu|\\Omega|\\%|%|\^\\circ)|$", side[match.end() :]):
        amount = _plain_amount(match)
        end = match.end()
    else:
        reading = read_number(side, log_base)
        end = reading.end
        amount = Amount(number(reading.tree), "", _half_digit(side[:end]), False)
    rest = _ROUNDED_TO.sub("", _UNCERTAINTY.sub("", side[end:])).strip()
    if (spread := _UNCERTAINTY.search(side, end)) and 2 * number(read_number(spread[0][3:]).tree) >= abs(amount.value):
        raise Unreadable("uncertain by half of its value or more: two values")
    rest = rest[1:-1].strip() if re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]", rest) else rest
    while scale := _SCALE.match(rest):
        text = "\\text{" if scale[0].startswith("\\text") and not scale[0].endswith("}") else ""
        factor = Fraction(_SCALES[scale[1].lower()])
        half = amount.half_digit * factor if amount.half_digit is not None else None
        amount = amount._replace(value=scaled(amount.value, factor), half_digit=half, scale=scale[1].lower())
        rest = (text + rest[scale.end() :]).strip()
    if changes(rest):
        raise Unreadable(f"more than one number: {short(rest, 30)!r} follows")
    return amount._replace(rest=rest)


def changes(rest: str) -> bool:
    """Whether the text behind a number changes or denies it, or holds another number that is no condition of another kind
    (5 m/s at 30 degrees)."""
    if DENIAL.search(f"1 {rest}") or _CHANGE.search(rest) or _SCALE.match(rest.strip()):
        return True
    flat = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", _EXPONENT.sub(lambda match: re.sub(r"\d", "", match[0]), rest))
    found = re.search(r"\d[\d.]*", flat)
    if not found:
        return False
    ours, theirs = parse_unit(rest), parse_unit(flat[found.end() :])
    unlike = bool(ours and theirs) and (ours[0].dimensions, ours[0].angle) != (theirs[0].dimensions, theirs[0].angle)
    return not (unlike and _UNDER.search(flat[: found.start()]))


def _half_digit(numeral: str) -> Fraction | None:
    match = _DIGITS.match(numeral.strip())
    if not match or not (match[2] or match[3] or match[4]):
        return None
    exponent = int((match[3] or match[4] or "0").replace(" ", ""))
    return Fraction(1, 2) * Fraction(10) ** (exponent - len(match[2] or ""))
