"""Lists of answers: ordered in square or round brackets, in any order in braces or bare."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache

from reasoning_evals.grading.expressions import grade_expression, grade_quantity
from reasoning_evals.grading.latex import clean, top_level
from reasoning_evals.grading.numbers import grade_number, read_amount
from reasoning_evals.grading.records import MAX_CHARS, Unreadable, Verdict, bad_target, correct, short, wrong
from reasoning_evals.grading.structure import split_words
from reasoning_evals.grading.workers import WorkerPool
from reasoning_evals.problems import Problem

MAX_ITEMS = 200


def grade_list(
    problem: Problem, answer: str, limit: float, pool: WorkerPool | None = None, in_process: bool = False
) -> Verdict:
    """Correct when there are as many values and each target value has its own equal answer, in order if the target is ordered.

    ``limit`` is the time in seconds that workers may take for the whole list.
    """
    if len(answer) > MAX_CHARS:
        return wrong(f"answer of {len(answer)} characters is longer than {MAX_CHARS}")
    targets, ordered = read_list(problem.target)
    answers, _ = read_list(answer)
    if not targets:
        return bad_target("an empty list")
    if len(targets) > MAX_ITEMS:
        return bad_target(f"{len(targets)} values are more than {MAX_ITEMS}")
    if len(answers) != len(targets):
        return wrong(f"{len(answers)} values, expected {len(targets)}")

    deadline = time.monotonic() + limit

    @cache
    def judge(row: int, column: int) -> Verdict:
        left = deadline - time.monotonic()
        return _grade_item(problem, targets[row], answers[column], max(left, 0.01), pool, in_process or left <= 0)

    return _in_order(targets, judge) if ordered else _in_any_order(targets, judge)


def read_list(text: str) -> tuple[list[str], bool]:
    """(values, whether their order counts).

    >>> read_list("[1, 2]"), read_list("x = 1 or x = 2")
    ((['1', '2'], True), (['1', '2'], False))
    """
    surface = re.sub(r"^.*(?:=|\\in(?![a-zA-Z]))\s*(?=\\?[\[({])", "", clean(text))
    ordered = False
    for opening, closing, in_order in (
        ("\\{", "\\}", False),
        ("{", "}", False),
        ("[", "]", True),
        ("(", ")", True),
        ("\\langle", "\\rangle", True),
    ):
        inside = surface[len(opening) : len(surface) - len(closing)]
        if surface.startswith(opening) and surface.endswith(closing) and _balanced(inside):
            surface, ordered = inside, in_order
            break
    separated = split_words(surface)
    values = top_level(separated, ";")  # values that hold commas are kept apart by semicolons
    values = values if len(values) > 1 else top_level(separated, ",")
    return [re.sub(r"^[a-zA-Z](?:_\{?\w+\}?)?\s*=\s*", "", value) for value in values if value], ordered


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _grade_item(
    problem: Problem, target: str, answer: str, limit: float, pool: WorkerPool | None, in_process: bool
) -> Verdict:
    try:
        amount = read_amount(target)
        kind = "quantity" if problem.unit or amount.rest else "number"
    except Unreadable:
        kind = "expression"
    item = Problem(problem.problem_id, problem.prompt, target, kind, unit=problem.unit, tolerance=problem.tolerance)
    if kind == "expression":
        return grade_expression(item, answer, limit, pool, in_process)
    return (grade_quantity if kind == "quantity" else grade_number)(item, answer)


def _in_order(targets: list[str], judge: Callable[[int, int], Verdict]) -> Verdict:
    for index in range(len(targets)):
        verdict = judge(index, index)
        if verdict.outcome != "correct":
            return verdict._replace(reason=f"value {index + 1}: {verdict.reason}")
    return correct(f"all {len(targets)} values equal, in order")


def _in_any_order(targets: list[str], judge: Callable[[int, int], Verdict]) -> Verdict:
    """Whether answers and targets can be matched one to one, by augmenting paths.

    Why not "take the first that fits": within a tolerance one answer may fit two targets. Targets 1.00 and 1.01 at 1 %, answers
    1.005 and 0.995: 1.005 fits both, 0.995 only the first. A greedy choice gives 1.005 to the first target and then finds no
    target for 0.995."""
    size = len(targets)
    taken_by: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column in (row, *(other for other in range(size) if other != row)):  # the same order is likely
            if column not in seen and judge(row, column).outcome == "correct":
                seen.add(column)
                if column not in taken_by or place(taken_by[column], seen):
                    taken_by[column] = row
                    return True
        return False

    for row in range(size):
        if not place(row, set()):
            verdicts = [judge(row, column) for column in range(size)]
            unsure = [verdict for verdict in verdicts if verdict.outcome != "correct" and verdict.outcome != "wrong"]
            return unsure[0] if unsure else wrong(f"no value for {short(targets[row])}")
    return correct(f"all {size} values equal, in any order")
