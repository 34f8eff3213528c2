r"""Grades expressions (equal as formulas, in whatever form), and lists: ordered in square or round brackets, in any order in
braces or bare.

Expressions are numbers, algebra, elementary functions, tuples, sets, intervals, matrices, equations, inequalities. What the
grammar does not read (integrals, sums, limits, derivatives of what has no formula) is right only where it is written as the target.

Parts: an answer "(a) 5 m (b) 3 s" is an ordered list of its parts, without their letters. A list is right when all its values
are; ``grade_parts`` tells them apart for who gives credit by part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from reasoning_evals.grading.formula import free_constant
from reasoning_evals.grading.identity import same_answer
from reasoning_evals.grading.latex import clean, unwrap
from reasoning_evals.grading.numbers import DECIMAL_COMMA, changes, read_amount
from reasoning_evals.grading.records import (
    MAX_CHARS,
    Contradiction,
    TooLarge,
    Unreadable,
    Verdict,
    bad_target,
    correct,
    in_any_order,
    short,
    top_level,
    wrong,
)
from reasoning_evals.grading.structure import NAME, letters, parse_answer, plus_minus, split_words
from reasoning_evals.grading.units import parse_unit
from reasoning_evals.grading.values import GRADERS, asks_percent, compare_amounts
from reasoning_evals.problems import Problem

MAX_ITEMS = 200
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ROMAN = ["i", "ii", "iii", "iv", "v", "vi"]
_NAMED = re.compile(r"(\\[a-zA-Z]+|[a-zA-Z])(?:\s*_\s*(?:\w|\{[^{}]*\}))?\s*=")
"""x = 1, \\theta = 1, v_0 = 1."""
_LABEL = r"([a-h]|i{1,3}|iv|vi?|[1-9])\)"
_TEXT_LABEL = re.compile(rf"\\text\s*\{{\s*(\(?{_LABEL})\s*\}}")
_PARTS = [re.compile(rf"(?:^|(?<=[\s,;.])){opening}{_LABEL}\s*") for opening in (r"\(", r"\(?")]
_UNCERTAIN = re.compile(r"(?=[^\\]*\.|.*\\pm[\s\d]*\.)[-+]?[\d.]+\s*\\pm\s*[\d.]+(?![\d.])")
_CHOICE = re.compile(
    r"\(?(?:\\text\s*\{\s*)?\(?(?:true|false|yes|no)\)?\s*\}?\)?|(?:\\text\s*\{\s*)?\([A-J]\)\s*\}?", re.IGNORECASE
)

_ROUNDED = re.compile(
    r"(?:\s*\(?\s*\\(?:approx|sim)(?![a-zA-Z])|\\text\s*\{\s*\(?\s*(?:or\s+)?(?:about|approximately|approx\.?)\s*\}?)\s*[-+]?\d[\d.,]*(?:\s*/100)?(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\s*\d\s*\}?)?)?[\s)}]*$"
)
"""Behind an exact answer, its decimals."""
_WORDS_BEHIND = re.compile(r"(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\s*\d\s*\}?)?|\s*\^\\circ)+\s*$")
_UNIT_TEXT = re.compile(r"\d[\s}]*(?:\\text\s*\{|\\mu\s*\\text|\^\\circ)|\d\s+[a-zA-Z]+(?:/[a-zA-Z]+)?(?:\^?\d)?$")


def grade_expression(problem: Problem, answer: str) -> Verdict:
    """The verdict on one expression."""
    if len(answer) > MAX_CHARS:
        return wrong(f"answer of {len(answer)} characters is longer than {MAX_CHARS}")
    target = clean(problem.target)
    given = free_constant(target, clean(answer))
    if "%" not in target and not asks_percent(problem):
        given = re.sub(r"\\?%", " /100 ", given).strip()
    if _letters_of(target) == _letters_of(given):
        return correct("the same formula")
    exact = _exactly(target), _exactly(given)
    if "=" in given or exact[1] != given:
        try:
            read_amount(re.sub(r"\((\s*\\approx[^()]*)\)$", r"\1", given))
        except Contradiction as error:
            return wrong(str(error))
        except Unreadable:
            pass
    if exact != (target, given):
        without = grade_expression(replace(problem, target=exact[0]), exact[1])
        if without.outcome == "correct":
            return without
    if verdict := _as_quantity(problem, target, given):
        return verdict
    try:
        if same_answer(parse_answer(target), parse_answer(given)):
            return correct("equal formulas")
    except TooLarge as error:
        return wrong(str(error))
    except Unreadable as error:
        return _without_words(target, given) or _unread(target, str(error))
    return _without_words(target, given) or wrong(f"{short(given)!r} is not equal to {short(target)!r}")


def _letters_of(text: str) -> str:
    """A formula without blanks, and without braces around one letter or digit."""
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", text.replace(" ", ""))


def _exactly(text: str) -> str:
    r"""11\sqrt2 of 11\sqrt2 \approx 15.56; a decimal number that has only a name stays."""
    bare = _ROUNDED.sub("", text)
    return bare if bare.strip() and not NAME.fullmatch(bare.strip()) else text


def _without_words(target: str, given: str) -> Verdict | None:
    """Units, degrees and words after an answer are dropped where the target has none, or words that are no unit (5.4 cents), and
    the reason says so. Other words than the target's are kept."""
    given = unwrap(given)
    bare, core = _WORDS_BEHIND.sub("", given), _bare_target(target)
    words, wanted = given[len(bare) :], letters(unwrap(target)[len(core) :]) if core != target else ""
    if not bare or not (words or wanted) or changes(words) or (core == target and _WORDS_BEHIND.search(target)):
        return None
    cases = all(re.search(r"\b(?:if|when|for|otherwise|else)\b", part) for part in (words, bare))
    if cases or (words and wanted and letters(words).removesuffix("s") != wanted.removesuffix("s")):
        return None
    try:
        same = same_answer(parse_answer(core), parse_answer(bare))
    except Unreadable:
        return None
    return correct(f"equal formulas, {short(words or wanted)!r} left out") if same else None


def _bare_target(target: str) -> str:
    """A target without the words behind it that are no unit."""
    flat = unwrap(target)
    core = _WORDS_BEHIND.sub("", flat)
    return core if core and core != flat and not parse_unit(flat[len(core) :]) else target


def _as_quantity(problem: Problem, target: str, given: str) -> Verdict | None:
    """Compare a target with a unit as an exact quantity: 5 km is not 5 m, and 1000 m is 1 km."""
    if not _UNIT_TEXT.search(target):
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


def _unread(target: str, why: str) -> Verdict:
    """Wrong, or the target's own fault."""
    target = _bare_target(target)
    try:
        same_answer(parse_answer(target), parse_answer(target))
    except Unreadable as error:
        return bad_target(f"{short(target)!r} cannot be read: {error}")
    return wrong(why)


def grade_list(problem: Problem, answer: str) -> Verdict:
    """Correct when there are as many values and each target value has its own equal answer, in order if the target is ordered."""
    found, expected = len(read_list(answer[:MAX_CHARS])[0]), len(read_list(problem.target)[0])
    if found > expected and (other := _other_commas(answer[:MAX_CHARS], expected)):
        answer, found = other, expected
    if found != expected and expected:
        return wrong(f"{found} values, expected {expected}")
    parts = part_verdicts(problem, answer)
    return next((part for part in parts if part.outcome != "correct"), correct(f"all {expected} values equal"))


def _other_commas(answer: str, expected: int) -> str | None:
    """The answer with the commas inside its numbers written otherwise, where that gives as many values as expected: 1,000 and
    2,000; 2,5 and 3,5. Not in brackets, nor where a comma without a blank parts the values too: (1,234,5) are three."""
    if re.search(r"[(\[]|\\\{|^\s*\{", clean(answer)):
        return None
    for commas, instead in ((_THOUSANDS, ""), (DECIMAL_COMMA, r"\1.\2"))[: 1 + (expected > 1)]:
        other = commas.sub(instead, answer)
        if not re.search(r"\d,\d", other) and len(read_list(other)[0]) == expected:
            return other
    return None


def part_verdicts(problem: Problem, answer: str) -> Iterator[Verdict]:
    """One verdict for each value of the target: on the answer at its place if the target is ordered, else on its own equal
    answer wherever it stands. An answer with more values than the target earns nothing: it may be a list of guesses."""
    targets, ordered, names = _named_values(problem.target)
    answers, _, others = _named_values(answer[:MAX_CHARS])
    if names and sorted(names) == sorted(others):  # y = 2, x = 1
        answers = [answers[others.index(name)] for name in names]
    if not 0 < len(targets) <= MAX_ITEMS:
        yield bad_target(f"{len(targets)} values, expected 1 to {MAX_ITEMS}")
        return
    if len(answer) > MAX_CHARS or len(answers) > len(targets):
        yield from [wrong(f"{len(answers)} values, expected {len(targets)}")] * len(targets)
        return

    @cache
    def judge(row: int, column: int) -> Verdict:
        return _grade_item(problem, targets[row], answers[column])

    if ordered:
        for index in range(len(targets)):
            verdict = judge(index, index) if index < len(answers) else wrong("no answer")
            yield verdict._replace(reason=f"value {index + 1}: {verdict.reason}")
    else:
        yield from in_any_order(targets, len(answers), judge)


def read_list(text: str) -> tuple[list[str], bool]:
    """(values, whether their order counts).

    >>> read_list("[1, 2]"), read_list("x = 1 or x = 2")
    ((['1', '2'], True), (['1', '2'], False))
    """
    return _named_values(text)[:2]


def _named_values(text: str) -> tuple[list[str], bool, list[str]]:
    """(values, whether their order counts, the letters that name them: x and y in "x = 1, y = 2", or nothing)."""
    if parts := _labelled(unwrap(_TEXT_LABEL.sub(r" \1 ", clean(text)))):
        return parts, True, []
    surface = unwrap(clean(text))
    name = re.match(r"(.*)(?:=|\\in(?![a-zA-Z]))\s*(?=\\?[\[({][^=]*$)", surface)
    if name and ("=" not in name[1] or len(top_level(split_words(name[1]), ",;")) == 1):  # A = B = {1, 2}
        surface = surface[name.end() :]
    ordered = False
    for opening, closing, in_order in (
        ("\\{", "\\}", False),
        ("{", "}", False),
        ("[", "]", True),
        ("(", ")", True),
    ):
        inside = surface[len(opening) : len(surface) - len(closing)]
        if surface.startswith(opening) and surface.endswith(closing) and _balanced(inside):
            surface, ordered = inside, in_order
            break
    separated = split_words(surface)
    values = top_level(separated, ";")  # values that hold commas are kept apart by semicolons
    values = values if len(values) > 1 else top_level(separated, ",")
    names = [name[1] for value in values if (name := _NAMED.match(value))]
    values = [re.sub(r"^(?:[a-zA-Z](?:_\{?[\w,]+\}?)?|\([a-zA-Z, ]+\))\s*=\s*", "", value) for value in values if value]
    signed = [sign for value in values for sign in ([value] if _UNCERTAIN.match(value) else plus_minus(value))]
    if len(set(names)) == len(names) == len(signed) > 1:  # x = 1, y = 2: each has its own place
        return signed, True, names
    return signed, ordered, []


def _labelled(surface: str) -> list[str]:
    """The parts of "(a) 5 (b) 7" in the order of their labels. A label with one bracket, or a number, only where all the
    text is such parts: in the points (5, 1), (3, 2) are none."""
    for labels in _PARTS:
        before, *labelled = labels.split(surface)
        parts = dict(zip(labelled[::2], (part.strip(" ,;.") for part in labelled[1::2]), strict=True))
        sure = labels is _PARTS[0] and not set(parts) & set("123456789")
        if (
            len(parts) > 1
            and all(parts.values())
            and any(sorted(parts) == marks[: len(parts)] for marks in (list("abcdefgh"), _ROMAN, list("123456789")))
            and len(labelled) == 2 * len(parts)
            and (sure or (not before.strip() and all(map(_balanced, parts.values()))))
        ):
            return [parts[label] for label in sorted(parts)]
    return []


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _grade_item(problem: Problem, target: str, answer: str) -> Verdict:
    kind = type_of(target, problem.unit)
    item = Problem(problem.problem_id, problem.prompt, target, kind, unit=problem.unit, tolerance=problem.tolerance)
    return grade_expression(item, answer) if kind == "expression" else GRADERS[kind](item, answer)


def type_of(target: str, unit: str | None = None, question: str = "") -> str:
    """What a published answer is, from how it is written: choice ((A), True, Yes; a bare letter where the question lists
    options), number, quantity or expression. Equations are expressions, and so is 3 a b: not all that follows a number is a
    unit."""
    if _CHOICE.fullmatch(clean(target)) or (
        re.fullmatch("[a-jA-J]", target) and re.search(r"\(a\).*\(b\)", question, re.S | re.I)
    ):
        return "choice"
    try:
        amount = read_amount(target)
        if amount.rest:
            return "quantity" if parse_unit(amount.rest) else "expression"
        one = _UNCERTAIN.match(clean(target)) or parse_answer(clean(target)).kind == "value"
        return ("quantity" if unit else "number") if one else "expression"
    except Unreadable:
        return "expression"
