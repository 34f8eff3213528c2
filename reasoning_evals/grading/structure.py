r"""The structure of an answer around its formulas: a value, a set, a tuple or interval, a matrix, a relation, plain words.

``parse_answer`` splits a cleaned text until every part is a single formula; ``same_answer`` compares two such trees part by
part. The order of the splits is what makes the notation unambiguous: "and" and "or" become commas; commas outside brackets
make a set (conditions are dropped first); then union signs; then relation signs; then the outer brackets; what is left is
one formula. Each part is split again in the same way. Worked examples:

    x = 3 or x = 5          set of the values 3 and 5, both named x; equals {5, 3}, because order does not count in a set
    (1, 2]                  sequence with the brackets "(]"; equals 1 < x <= 2, which ``_interval`` turns into the same sequence
    x < 1 or x > 2          set of two relations; equals the union (-oo, 1) \cup (2, oo), relation by interval
    phi = Q/r, r > R        the value Q/r with the name phi: an inequality next to a value is a condition and is dropped
    2x = 4                  a relation; equals x - 2 = 0, because the differences of the sides are proportional
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reasoning_evals.grading.identity import proportional, same_formula
from reasoning_evals.grading.latex import depth, top_level
from reasoning_evals.grading.records import MAX_NESTING, TooLarge, Unreadable, check_size

MAX_PARTS = 64

_OR = re.compile(
    r"\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|land|vee|wedge)(?![a-zA-Z]))\s*"
)
_RELATION = re.compile(
    r"\\to(?![a-zA-Z])|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\sim(?![a-zA-Z])|(?<![<>!:])=|\\leq|\\geq|\\neq|<=|>=|<|>|!=|:="
)
_OPERATORS = {
    "\\to": "=",
    "\\approx": "=",
    "\\equiv": "=",
    "\\sim": "=",
    ":=": "=",
    "<=": "\\leq",
    ">=": "\\geq",
    "!=": "\\neq",
}
_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_MATRIX = re.compile(r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\1\}$", re.DOTALL)
_MEMBER = re.compile(r"^\s*[a-zA-Z]\s*\\in(?![a-zA-Z])")
_SUFFIX = r"(?:\s*_\s*(?:[\w+-]|\\[a-zA-Z]+|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\text\s*\{[^{}]*\})|'|\s*\^\s*\{\s*(?:\\text\s*\{[^{}]*\}|\(\w+\))\s*\})*"
_SYMBOL = rf"(?:\\(?:hat|dot|ddot|bar|tilde|overline|Delta|delta)\s*)?\{{?\s*\\?[a-zA-Z]+\s*\}}?{_SUFFIX}\s*"
_NAME = re.compile(
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
_INEQUALITY = re.compile(r"<|>|\\(?:leq|geq|neq|ll|gg)(?![a-zA-Z])")
_CONDITION = re.compile(
    r"(?<=[\s}\w)])\s+\(\s*[^()=]{1,20}(?:<|>|\\leq|\\geq)[^()=]{1,20}\)$|\s*\\text\s*\{\s*\(?(?:for|at|when|if|where|in|as|outside|inside)\b.*$"
)
_RATIO = re.compile(r"([^:=()]+):([^:=()]+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """``kind`` is value, set, sequence, union, matrix, relation or words.

    ``text``: a value's formula, the words, a sequence's brackets, or a relation's operators.
    ``name`` is the left side of a value that was given as ``x = ...``.
    """

    kind: str
    text: str
    parts: tuple[Answer, ...] = ()
    name: str = ""


def parse_answer(text: str) -> Answer:
    """The structure of an answer from ``clean``. Raises Unreadable where brackets do not close or parts are too many."""
    text = check_size(text).strip().rstrip(",;").strip().lstrip("= ")
    if depth(text) > MAX_NESTING:
        raise TooLarge(f"answer is nested deeper than {MAX_NESTING} levels")
    if not text:
        raise Unreadable("an empty part")
    if _is_words(text):
        return Answer("words", letters(text))
    text = _MEMBER.sub("", split_words(text)).strip()
    if matrix := _MATRIX.match(text):
        return _matrix(matrix[2])
    text = _CONDITION.sub("", text).strip()
    pieces = _without_conditions([piece for piece in top_level(text, ",;") if piece])
    if len(pieces) == 1:
        text = pieces[0]
    if len(pieces) > 1 and not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return _collection("set", "", pieces)
    unions = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(unions) > 1:
        return _collection("union", "", unions)
    relation = _relation(text)
    if relation is not None:
        return relation
    if ratio := _RATIO.fullmatch(text):
        return Answer("value", f"({ratio[1]})/({ratio[2]})")
    return _bracketed(text) or _plus_minus(text) or Answer("value", text)


def _without_conditions(pieces: list[str]) -> list[str]:
    """Values without their conditions: "phi = Q/r, r > R" is phi = Q/r. Inequalities without a value are kept."""
    conditions = [
        piece for piece in pieces if _INEQUALITY.search(piece) or re.match(r"[a-zA-Z]\s*\\in(?![a-zA-Z])", piece)
    ]
    return [piece for piece in pieces if piece not in conditions] if 0 < len(conditions) < len(pieces) else pieces


def split_words(text: str) -> str:
    r"""``and`` and ``or`` between values as commas."""
    return re.sub(r"(?:\s*,\s*){2,}", " , ", _OR.sub(" , ", text))


def same_answer(target: Answer, answer: Answer) -> bool:
    """Whether two answers mean the same. Raises Unreadable where a part is not a formula, so that another grader may try."""
    target, answer = _single(target), _single(answer)
    if "words" in (target.kind, answer.kind):
        return not target.parts and not answer.parts and letters(target.text) == letters(answer.text)
    if target.kind != answer.kind:
        return _mixed(target, answer)
    if target.kind == "value":
        return same_formula(target.text, answer.text)
    if target.kind == "relation":
        return _same_relation(target, answer)
    if len(target.parts) != len(answer.parts) or target.text != answer.text:
        return False
    if target.kind in ("set", "union"):
        return _same_set(list(target.parts), list(answer.parts))
    return all(same_answer(ours, theirs) for ours, theirs in zip(target.parts, answer.parts, strict=True))


def letters(text: str) -> str:
    r"""Only letters and digits, in lower case: \\text{June 20} is June 20."""
    return re.sub(r"\\text|[^a-zA-Z0-9]", "", text).lower()


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
    if len(pieces) > MAX_PARTS:
        raise Unreadable(f"{len(pieces)} parts are more than {MAX_PARTS}")
    parts: list[Answer] = []
    for piece in pieces:
        part = parse_answer(piece)
        both = part.kind == "set" and kind == "set" and "\\pm" in piece
        parts += part.parts if both else [part]
    return Answer(kind, brackets, tuple(parts))


def _matrix(body: str) -> Answer:
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()]
    parsed = tuple(_collection("sequence", "row", row.split("&")) for row in rows[: MAX_PARTS + 1])
    if len(parsed) > MAX_PARTS:
        raise Unreadable("a matrix with too many rows")
    return Answer("matrix", "", parsed)


def _relation(text: str) -> Answer | None:
    """A value after a name (x = 5), or a relation between formulas."""
    operators: list[str] = []

    def mark(match: re.Match[str]) -> str:
        operators.append(_OPERATORS.get(match.group(), match.group()))
        return "\x00"

    sides = top_level(_RELATION.sub(mark, text), "\x00")
    sides = [side.strip() for side in sides]
    if len(sides) == 1:
        return None
    if len(sides) != len(operators) + 1:
        raise Unreadable("a relation inside brackets")
    if all(operator == "=" for operator in operators):
        if len(sides) > 2 or _NAME.fullmatch(sides[0]) or _is_words(sides[0]):
            value = parse_answer(sides[-1])
            return Answer(value.kind, value.text, value.parts, name=sides[0])
        if _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]) and re.fullmatch(r"[-\d./\\a-z{}]+", sides[0]):
            return Answer("value", sides[0], name=sides[1])
    return Answer("relation", " ".join(operators), tuple(Answer("value", side) for side in sides))


def _bracketed(text: str) -> Answer | None:
    """A set in braces, or a tuple or interval: brackets around at least two parts."""
    braces = re.fullmatch(r"\\\{(.*)\\\}|\{([^{}]*[,;][^{}]*)\}", text, re.DOTALL)
    if braces:
        inside = (braces[1] or braces[2] or "").strip()
        if re.search(r":|\\mid|\|", inside):
            raise Unreadable("a set given by a condition")
        return _collection("set", "", [piece for piece in top_level(inside, ",;") if piece])
    for opening, closing in (("\\langle", "\\rangle"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing):
            pieces = top_level(text[len(opening) : -len(closing)], ",;")
            if len(pieces) > 1:
                return _collection("sequence", "()" if opening == "\\langle" else opening + closing, pieces)
    return None


def _plus_minus(text: str) -> Answer | None:
    if not re.search(r"\\[pm][pm](?![a-zA-Z])", text):
        return None
    upper = re.sub(r"\\mp(?![a-zA-Z])", "-", re.sub(r"\\pm(?![a-zA-Z])", "+", text))
    lower = re.sub(r"\\mp(?![a-zA-Z])", "+", re.sub(r"\\pm(?![a-zA-Z])", "-", text))
    return _collection("set", "", [upper, lower])


def _single(answer: Answer) -> Answer:
    """A set with one part, (5) or {5}, is that part."""
    while answer.kind in ("set", "union") and len(answer.parts) == 1:
        answer = answer.parts[0]
    return answer


def _mixed(target: Answer, answer: Answer) -> bool:
    kinds = {target.kind, answer.kind}
    if kinds == {"value", "relation"}:
        value, relation = (target, answer) if target.kind == "value" else (answer, target)
        if value.name and relation.text == "=":
            named = Answer("relation", "=", (Answer("value", value.name), Answer("value", value.text)))
            return _same_relation(named, relation)
        return False
    if kinds == {"sequence", "relation"}:
        sequence, relation = (target, answer) if target.kind == "sequence" else (answer, target)
        interval = _interval(relation)
        return interval is not None and same_answer(sequence, interval)
    if kinds == {"union", "set"}:  # x < 1 or x > 2
        return len(target.parts) == len(answer.parts) and _same_set(list(target.parts), list(answer.parts))
    return False


def _interval(relation: Answer) -> Answer | None:
    """x <= 3 as (-oo, 3], 1 < x <= 5 as (1, 5]; None for other relations."""
    operators, sides = relation.text.split(), [part.text for part in relation.parts]
    if operators[0] in (">", "\\geq"):
        operators, sides = [_FLIPPED.get(operator, operator) for operator in operators[::-1]], sides[::-1]
    if any(operator not in ("<", "\\leq") for operator in operators):
        return None
    if len(sides) == 2:
        sides, operators = (
            (["-\\infty", *sides], ["<", *operators])
            if _NAME.fullmatch(sides[0])
            else ([*sides, "\\infty"], [*operators, "<"])
        )
    if len(sides) != 3 or not _NAME.fullmatch(sides[1]):
        return None
    brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    return Answer("sequence", brackets, (Answer("value", sides[0]), Answer("value", sides[2])))


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
    if len(ours) != len(theirs):
        return False
    sides = [part.text for part in answer.parts]
    if ours != theirs:
        if [_FLIPPED.get(operator, operator) for operator in theirs[::-1]] != ours:
            return False
        sides, theirs = sides[::-1], ours
    for index, operator in enumerate(ours):
        left = (target.parts[index].text, target.parts[index + 1].text)
        ratio = proportional(left, (sides[index], sides[index + 1]))
        if ratio is None or (operator not in ("=", "\\neq") and ratio < 0):
            return False
    return True
