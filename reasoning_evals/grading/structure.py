r"""The structure of an answer around its formulas: a value, a set, a tuple or interval, a matrix, a relation, plain words.

``parse_answer`` splits a cleaned text until every part is a single formula; ``same_answer`` compares two such trees part by
part. The order of the splits is what makes the notation unambiguous: "and" and "or" become commas; commas outside brackets
make a set (conditions are dropped first); then union signs; then relation signs; then the outer brackets; what is left is
one formula. Each part is split again in the same way. Worked examples:

    x = 3 or x = 5          set of the values 3 and 5, both named x; equals {5, 3}, because order does not count in a set
    (1, 2]                  sequence with the brackets "(]"; equals 1 < x <= 2, which ``interval_of`` turns into the same sequence
    x < 1 or x > 2          set of two relations; equals the union (-oo, 1) \cup (2, oo), relation by interval
    phi = Q/r, r > R        the value Q/r with the name phi: an inequality next to a value is a condition and is dropped
    2x = 4                  a relation; equals x - 2 = 0, because the differences of the sides are proportional
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reasoning_evals.grading.latex import unwrap
from reasoning_evals.grading.records import Unreadable, check_size, top_level

_OR = re.compile(
    r"\s*(?:\\text\s*\{\s*,?\s*(?:and|or|und|oder|et|ou|y|[或且和])\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[或且和]|\\(?:lor|land|vee|wedge)(?![a-zA-Z])|\\&)\s*"
)
_EITHER = re.compile(r"(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z])|或")
_BOTH = re.compile(r"(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:land|wedge)(?![a-zA-Z])|[且和]")
_RELATION = re.compile(
    r"\\to(?![a-zA-Z])|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\sim(?![a-zA-Z])|(?<![<>!:])=|\\leq|\\geq|\\neq|<=|>=|<|>|!=|:="
)
_OPERATORS = {"<=": "\\leq", ">=": "\\geq", "!=": "\\neq"} | dict.fromkeys(
    ("\\to", "\\approx", "\\equiv", "\\sim", ":="), "="
)
FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_MATRIX = re.compile(
    r"([^=,;<>&]*?)[(\[]?\s*\\begin\s*\{([pbvBV]?(?:small)?[pbvBV]?matrix|array)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\2\}\s*[)\]]?$",
    re.DOTALL,
)
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)|\\?\{\s*\\?\}")
_REALS = re.compile(
    r"(?:\\mathbb\s*\{?\s*R\s*\}?|\(\s*-\s*\\infty\s*,\s*\+?\s*\\infty\s*\)(?=.)|(?:\\text\s*\{)?\s*[aA]ll (?:real numbers|reals)\s*\}?)"
    r"\s*(?:(\\setminus|\\smallsetminus|\\backslash|(?:\\text\s*\{\s*)?except(?: for)?\s*\}?|-)|[,:|]|\\mid|\\text\s*\{\s*with\s*\}|$)\s*(.*)"
)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\s*(?:\\text\s*\{)?\s*(?:([ap])\.?\s*m\.?)?\s*\}?", re.IGNORECASE)
_HOUR = re.compile(
    r"^(\d{1,2})\s*(?:\\text\s*\{)?\s*([AaPp])(?:M|\.\s*[mM]\.?)\s*\}?$"
)  # 3 PM, but 3 pm may be picometres
DENIAL = re.compile(
    r"(?<![a-zA-Z\\])(?:not|never|neither|nor|or|but|unless|except|instead|oder|yes|wrong|incorrect|false|impossible|(?:upper|lower)\s+bound|fail(?:s|ed)?|excluded|eliminated|rejected|no(?!\s*\.|\s+unit))"
    r"(?![a-zA-Z])|^\\text\s*\{\s*(?:for|if|when)(?![a-zA-Z])|(?<![a-zA-Z])(?:if|when|where|with|at|for)(?![a-zA-Z])[\s}]*\\?\w*\s*(?:=|$)"
    r"|[a-z]n't(?![a-zA-Z])|(?<![a-zA-Z])(?:cannot|too\s+\w+|değil)(?![a-zA-Z])|[不非未或]|没有|(?<!没)错|間違|틀[렸린]|невер|неправ|(?<![a-zA-Z])(?:falsch|faux|sbagliat)|(?:では|じゃ)(?:な|あり)|아[니닙닌]|नहीं",
    re.IGNORECASE,
)
"""Words that take an answer back, state another one, or make it a condition ("for q = 0")."""
_MEMBER = re.compile(r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])")
_ARTICLE = re.compile(r"^(?:[Aa]n|[Tt]he|a(?=\s+[a-zA-Z]{2})|A(?=\s+[a-z]{2}))\s+")  # but "A C" are two letters
_ISO = re.compile(r"([\]\[])(\s*[^\[\],;\s][^\[\],;]*[,;]\s*[^\[\],;\s][^\[\],;]*)([\]\[])")
_TO = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|to(?![a-zA-Z]))\s*(?=\d)")
_TUPLE_NAME = re.compile(r"[a-zA-Z](?:\s*:\s*[a-zA-Z])+|\(\s*\\?[a-zA-Z]+(?:_\w)?(?:\s*,\s*\\?[a-zA-Z]+(?:_\w)?)+\s*\)")
_TRANSPOSED = re.compile(r"\s*\^\s*\{?\s*(?:\\top|\\intercal|T|\\text\s*\{\s*T\s*\})\s*\}?$")
_UNIT_VECTOR = re.compile(r"\\hat\s*(?:\{\s*([ijkxyz])\s*\}|([ijkxyz])(?![a-zA-Z]))")
_VECTOR = re.compile(rf"{_UNIT_VECTOR.pattern}|(?<![a-zA-Z\\])j")
_AXES = str.maketrans("xyz", "ijk")
_SUFFIX = r"(?:\s*_\s*(?:[\w+-]|\\[a-zA-Z]+|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\text\s*\{[^{}]*\})|'|\s*\^\s*\{\s*(?:\\text\s*\{[^{}]*\}|\(\w+\))\s*\})*"
_SYMBOL = rf"(?:\\(?:hat|dot|ddot|bar|tilde|overline|Delta|delta)\s*)?\{{?\s*\\?[a-zA-Z]+\s*\}}?{_SUFFIX}\s*"
NAME = re.compile(
    rf"{_SYMBOL}(?:\(\s*[^()=]{{1,30}}\))?|\|?{_SYMBOL}\|?"
    rf"|\\frac\s*\{{\s*(?:d\s*)?{_SYMBOL}\}}\s*\{{\s*(?:d\s*)?{_SYMBOL}\}}|{_SYMBOL}/\s*{_SYMBOL}"
    r"|(?:\\text\s*\{[^{}]*\}\s*)+(?:of\s*)?[a-zA-Z]?"
)
# Words of two letters or more, or single letters after a word and a blank. The pattern can match every letter in one way only: with
# two ways, a long sentence that fails to match would take exponential time.
_WORDS = re.compile(
    r"(?:\\text\s*\{[^{}\\$]*\}|[A-Za-z]{2,}(?![A-Za-z])|(?<=[A-Za-z] )[A-Za-z](?![A-Za-z])|[\s,.;!?'\"-])+"
)
_FORMULA_WORDS = re.compile(r"\b(?:sin|cos|tan|ln|log|exp|sqrt|pi|frac)\b")
_NUMERIC = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:frac|sqrt|cdot|times|pi)(?![a-zA-Z]))+")
_INEQUALITY = re.compile(r"<|>|\\(?:leq|geq|neq|ll|gg)(?![a-zA-Z])")
_CONDITION = re.compile(
    r"(?<=[\s}\w)])\s+\(\s*[^()=]{1,20}(?:<|>|\\leq|\\geq)[^()=]{1,20}\)$|\s*(?<![_^{])(?<![_^{] )\\text\s*\{\s*\(?(?:for|at|when|if|where|in|as|outside|inside)\b(?!.*\\text\s*\{[^{}]*\b(?:if|when|for|otherwise|else)\b).*$"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """``kind`` is value, set, sequence, union, complement (in the real numbers), matrix, relation, ratio or words.

    ``text``: a value's formula, the words, a sequence's brackets, a relation's operators, "or" or "and" between relations, or a clock
    time's "a" or "p".
    ``name`` is the left side of a value that was given as ``x = ...``.
    """

    kind: str
    text: str
    parts: tuple[Answer, ...] = ()
    name: str = ""


def parse_answer(text: str) -> Answer:
    """The structure of an answer from ``clean``. Raises Unreadable for several matrices, and relations inside brackets."""
    text = re.sub(r"^(?:\\approx(?![a-zA-Z])|[=\s])+", "", check_size(text).strip().rstrip(",;").strip())
    if clock := _CLOCK.fullmatch(_HOUR.sub(r"\1:00 \2m", unwrap(text))):
        parts = tuple(Answer("value", digits) for digits in clock.groups()[:3] if digits)
        return Answer("ratio", (clock[4] or "").lower(), parts)
    if reals := _REALS.fullmatch(_MEMBER.sub("", text).strip()):
        if not reals[2]:
            return Answer("complement", "")
        return Answer("complement", "", (parse_answer(reals[2]),)) if reals[1] else parse_answer(reals[2])
    if _is_words(text):
        return Answer("words", letters(text))
    either = "or" if _EITHER.search(text) else "and" * bool(_BOTH.search(text))
    text = _TO.sub(":", _MEMBER.sub("", split_words(unwrap(text))).strip())
    flat = _TRANSPOSED.sub("", text)
    if matrix := _MATRIX.match(flat):
        return _matrix(matrix[1], matrix[3], "v" in matrix[2].lower(), flat != text)
    text = (
        flat if re.match(r"\(.*\)$|\[.*\]$", flat) and len(top_level(flat[1:-1], ",;")) > 1 else text
    )  # not (1 + r)^T
    text = _ISO.sub(_in_brackets, text)
    if _EMPTY.fullmatch(text):
        return Answer("set", "")
    text = _CONDITION.sub("", text).strip()
    pieces = _without_conditions([piece for piece in top_level(text, ",;") if piece])
    if len(pieces) == 1:
        text = pieces[0]
    if len(pieces) > 1 and not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return _collection("set", either, pieces)
    if len(halves := re.split(r"\\(setminus|smallsetminus|backslash|cap)(?![a-zA-Z])", text)) == 3:  # not (not A or B)
        left, right = Answer("complement", "", (parse_answer(halves[0]),)), parse_answer(halves[2])
        right = Answer("complement", "", (right,)) if halves[1] == "cap" else right
        return Answer("complement", "", (Answer("union", "", (left, right)),))
    unions = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(unions) > 1:
        return _collection("union", "", unions)
    relation = _relation(text)
    if relation is not None:
        return relation
    if len(ratio := top_level(text, ":")) > 1:
        return _collection("ratio", "", ratio)
    signs = plus_minus(text)
    return _bracketed(text) or (_collection("set", "", signs) if len(signs) > 1 else Answer("value", text))


def _without_conditions(pieces: list[str]) -> list[str]:
    """Values without their conditions: "phi = Q/r, r > R" is phi = Q/r. Inequalities without a value are kept."""
    conditions = [
        piece for piece in pieces if _INEQUALITY.search(piece) or re.match(r"[a-zA-Z]\s*\\in(?![a-zA-Z])", piece)
    ]
    return [piece for piece in pieces if piece not in conditions] if 0 < len(conditions) < len(pieces) else pieces


def split_words(text: str) -> str:
    r"""``and`` and ``or`` between values as commas."""
    return re.sub(r"(?:\s*,\s*){2,}", " , ", _OR.sub(" , ", text))


def letters(text: str) -> str:
    r"""Only letters and digits, in lower case: \\text{June 20} is June 20."""
    words = re.sub(r"\\text|[{}]", " ", text).strip()
    words = re.sub(r"(?<=\d)\s*\^?\s*(?:st|nd|rd|th)\b", "", words)
    return re.sub(r"[^a-zA-Z0-9]", "", _ARTICLE.sub("", words)).lower()


def _is_words(text: str) -> bool:
    if re.fullmatch(r"\\text\s*\{\s*\(?[A-Z]\)?\s*\}", text):  # the letter of an option
        return True
    if not _WORDS.fullmatch(text) or _FORMULA_WORDS.search(text):
        return False
    if "\\text" in text:
        inside = re.sub(r"\\text|[{}]", " ", text)
        return len(re.findall(r"[A-Za-z]+", inside)) > 1 or bool(re.search(r"[A-Za-z]{3}", inside))
    return bool(re.search(r"[A-Za-z]{4}", text))


def _collection(kind: str, brackets: str, pieces: list[str]) -> Answer:
    parts: list[Answer] = []
    for piece in pieces:
        part = parse_answer(piece)
        both = part.kind == "set" and kind == "set" and "\\pm" in piece
        parts += part.parts if both else [part]
    # {5} is 5, but {{}} is not {}, nor {{5, 6}} {5, 6}
    alone = kind == "set" and len(parts) == 1 and parts[0].kind != "set"
    brackets = "" if kind == "set" and {part.kind for part in parts} != {"relation"} else brackets
    return parts[0] if alone else Answer(kind, brackets, tuple(parts))


def _in_brackets(match: re.Match[str]) -> str:
    """]0, 1[ as (0, 1), and [0, 1[ as [0, 1)."""
    return ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]")


def _matrix(factor: str, body: str, determinant: bool, transposed: bool) -> Answer:
    """The rows of a matrix, each entry times the factor before it."""
    factor = "-1" if factor.strip() == "-" else "" if _is_words(factor) else factor.strip()
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", body.replace(r"\hline", "")) if row.strip()]
    if "\\begin" in body or any(factor.count(one) != factor.count(two) for one, two in ("()", "[]", "{}")):
        raise Unreadable("several matrices")
    if factor:
        rows = [[f"({factor})*({entry})" for entry in row] for row in rows]
    rows = [list(column) for column in zip(*rows, strict=False)] if transposed else rows
    return Answer("matrix", "|" * determinant, tuple(_collection("sequence", "row", row) for row in rows))


def _relation(text: str) -> Answer | None:
    """A value after a name (x = 5), or a relation between formulas."""
    operators: list[str] = []

    def mark(match: re.Match[str]) -> str:
        operators.append(_OPERATORS.get(match.group(), match.group()))
        return "\x00"

    sides = top_level(_RELATION.sub(mark, text), "\x00")
    if len(sides) == 1:
        return None
    if len(sides) != len(operators) + 1:
        raise Unreadable("a relation inside brackets")
    if any(DENIAL.search(side) for side in sides[:-1]):
        return Answer("words", letters(text))  # a condition or a denial, not a value with a name
    if all(operator == "=" for operator in operators):
        if (
            len(sides) > 2
            or all(map(_NUMERIC.fullmatch, sides))
            or NAME.fullmatch(sides[0])
            or _is_words(sides[0])
            or _TUPLE_NAME.fullmatch(sides[0])
        ):
            value = parse_answer(sides[-1])
            shared = "\\to" in text or (len(sides) > 2 and NAME.fullmatch(sides[1]))  # x = y = 5 names both
            return Answer(value.kind, value.text, value.parts, name="" if shared else sides[0])
        if NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]) and re.fullmatch(r"[-\d./\\a-z{}]+", sides[0]):
            return Answer("value", sides[0], name=sides[1])
    return Answer("relation", " ".join(operators), tuple(Answer("value", side) for side in sides))


def _bracketed(text: str) -> Answer | None:
    """A set in braces, or a tuple or interval: brackets around at least two parts."""
    braces = re.fullmatch(r"\\\{(.*)\\\}|\{([^{}]*[,;][^{}]*)\}", text, re.DOTALL)
    if braces:
        inside = (braces[1] or braces[2] or "").strip()
        if builder := re.fullmatch(r"[a-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?::|\\mid|\|)(.*)", inside):
            condition = parse_answer(builder[1])
            if {part.kind for part in condition.parts or (condition,)} == {"relation"} or _INEQUALITY.search(
                condition.text
            ):
                return condition
        return _collection("set", "", [piece for piece in top_level(inside, ",;") if piece])
    if text[:1] in ("(", "[") and text[-1] in (")", "]") and len(pieces := top_level(text[1:-1], ",;")) > 1:
        return _collection("sequence", text[0] + text[-1], pieces)
    return None


def named_tuple(values: Answer, like: Answer | None = None) -> Answer | None:
    """x = 1, y = 2 as (1, 2): x, y, z in this order, other names in that of ``like`` or as written; None for longer names."""
    names = [part.name.replace(" ", "") for part in values.parts]
    letters = [
        found[0] for name in names if (found := re.match(r"\\?[a-zA-Z]+(?=$|_)", name))
    ]  # but x_1, x_2 are roots
    if not 1 < len(letters) == len(names) == len(set(letters)):
        return None
    order = (
        sorted(names) if set(names) <= set("xyz") else [part.name.replace(" ", "") for part in (like or values).parts]
    )
    by_name = dict(zip(names, values.parts, strict=True))
    parts = [by_name[name] for name in order] if set(order) == set(names) else values.parts
    return Answer("sequence", "()", tuple(Answer(part.kind, part.text, part.parts) for part in parts))


def in_components(vector: Answer) -> str | None:
    """The tuple or column (3, -4) as the formula 3 i - 4 j; None for what is no vector of the plane or of space."""
    parts = [part.parts[0] if part.kind == "sequence" and len(part.parts) == 1 else part for part in vector.parts]
    if vector.text not in ("", "()", "[]") or len(parts) not in (2, 3) or {part.kind for part in parts} != {"value"}:
        return None
    return " + ".join(f"({part.text}) {axis}" for part, axis in zip(parts, "ijk", strict=False))


def along_axes(text: str) -> str | None:
    r"""Unit vectors in one form, with a hat or without: 3 \hat{x} is 3 i. None where i is the imaginary unit: no hat, no j."""
    if not _VECTOR.search(text) and re.search(r"\\sqrt\s*\{?\s*-|i", re.sub(r"\\(?!sqrt)[a-zA-Z]+", "", text)):
        return None
    return _UNIT_VECTOR.sub(lambda match: f" {(match[1] or match[2]).translate(_AXES)} ", text)


def plus_minus(text: str) -> list[str]:
    r"""Both values of a text with \pm, or the text alone."""
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return [text]
    upper = re.sub(r"\\mp(?![a-zA-Z])", "-", re.sub(r"\\pm(?![a-zA-Z])", "+", text))
    lower = re.sub(r"\\mp(?![a-zA-Z])", "+", re.sub(r"\\pm(?![a-zA-Z])", "-", text))
    return [upper, lower]
