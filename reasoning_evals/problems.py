"""Problems: a question and its right answer; read from and written to JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.files import write_whole
from moe_steer.json_files import quoted, read_json_lines

ANSWER_TYPES = ("integer", "number", "quantity", "expression", "choice", "list")
"""Answer types that a grader can judge."""
LABEL = "label"
"""The answer type that only a classifier judges (``reasoning_evals.safety``); the target is the label of a good answer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its right answer.

    ``target`` is text; numbers, booleans and lists given in code or JSON are turned into it. A list target in square or
    round brackets is ordered, in braces or bare (``2, 3``) it is not. A quantity's target may carry its own unit. ``unit``
    is the unit that the question asks for. ``cluster_id`` is equal for problems with a common source (a paper, a template).
    ``tolerance`` is the accepted relative error of a number or quantity; None leaves it to the grader, 0 means exact.
    """

    problem_id: str
    prompt: str
    target: str
    answer_type: str
    unit: str | None = None
    cluster_id: str | None = None
    domain: str | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("problem_id", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {quoted(value)}: expected a text that is not empty")
        if self.answer_type not in (*ANSWER_TYPES, LABEL):
            raise ValueError(
                f"problem {quoted(self.problem_id)}: answer_type is {quoted(self.answer_type)}, expected one of {', '.join((*ANSWER_TYPES, LABEL))}"
            )
        for name in ("unit", "cluster_id", "domain"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"problem {quoted(self.problem_id)}: {name} is {quoted(value)}, expected a text or nothing"
                )
        object.__setattr__(self, "target", _target_text(self.target, self.problem_id))
        if self.answer_type == "integer":
            object.__setattr__(self, "target", _integer_text(self.target, self.problem_id))
        if self.tolerance is not None and not _is_tolerance(self.tolerance):
            raise ValueError(
                f"problem {quoted(self.problem_id)}: tolerance is {quoted(self.tolerance)}, expected a relative error from 0 to below 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; ``from_dict`` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Problem:
        """ValueError names missing and unknown keys, and the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(row) - set(known))
        missing = [name for name in ("problem_id", "prompt", "target", "answer_type") if name not in row]
        if unknown or missing:
            wrong = [f"unknown column {quoted(name)}" for name in unknown[:4]] + [
                f"column {name!r} is missing" for name in missing
            ]
            raise ValueError(
                f"{', '.join(wrong)}: a problem has the columns {', '.join(known)}; other names are mapped by columns={{...}}"
            )
        return cls(**row)


def check_unique(problems: Iterable[Problem], source: str = "the problems") -> None:
    """ValueError when two problems have the same id: results are joined on it."""
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id in seen:
            raise ValueError(
                f"{source}: problem_id {quoted(problem.problem_id)} occurs twice, every problem needs its own"
            )
        seen.add(problem.problem_id)


def write_problems(path: str | os.PathLike[str], problems: Iterable[Problem]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    problems = list(problems)
    check_unique(problems, str(path))
    text = "".join(json.dumps(problem.to_dict(), ensure_ascii=False) + "\n" for problem in problems)
    write_whole(Path(path), text)


def read_problems(path: str | os.PathLike[str], torn_tail: bool = False) -> list[Problem]:
    """The problems of a JSON lines file, plain or gzipped.

    ``torn_tail``: ignore a last line that a killed writer left unfinished. Any other line that is not a problem is a ValueError
    with file and line.
    """
    problems = []
    for where, row in read_json_lines(path, torn_tail=torn_tail):
        try:
            problems.append(Problem.from_dict(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    check_unique(problems, str(path))
    return problems


def _target_text(target: object, problem_id: str) -> str:
    """Text of a target given as a Python or JSON value."""
    if isinstance(target, bool):
        return "True" if target else "False"
    if isinstance(target, int):
        return str(target)
    if isinstance(target, float) and math.isfinite(target):
        return repr(target)
    if isinstance(target, list | tuple) and target:
        return "[" + ", ".join(_target_text(item, problem_id) for item in target) + "]"
    if isinstance(target, str) and target.strip():
        return target.strip()
    raise ValueError(
        f"problem {quoted(problem_id)}: target is {quoted(target)}, expected a text, a finite number, or a list of them"
    )


def _integer_text(target: str, problem_id: str) -> str:
    # By thousands, or as in India; 1,2,3 are three numbers.
    grouped = re.fullmatch(r"[+-]?\d{1,3}(,\d{2,3})*,\d{3}", target)
    digits = target.replace(",", "") if grouped else target
    if not re.fullmatch(r"[+-]*\d+", digits, re.ASCII) or len(digits) > 1000:
        raise ValueError(
            f"problem {quoted(problem_id)}: target is {quoted(target)}, an integer has digits and a sign alone; "
            f"for other numbers set answer_type to number"
        )
    try:
        return str(int(digits))
    except ValueError as error:
        raise ValueError(f"problem {quoted(problem_id)}: target is {quoted(target)}, expected one integer") from error


def _is_tolerance(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def asked_once(problems: Sequence[Problem]) -> list[Problem]:
    """Problems with one text share a cluster: one question under two ids is no second problem, and no part of a run may hold both."""
    by_text: dict[str, list[Problem]] = {}
    for problem in problems:
        by_text.setdefault(" ".join(problem.prompt.split()), []).append(problem)
    cluster_of: dict[str, str | None] = {problem.problem_id: problem.cluster_id for problem in problems}
    for same in (some for some in by_text.values() if len(some) > 1):
        held = [cluster for one in same if (cluster := cluster_of[one.problem_id])]
        shared = held[0] if held else same[0].problem_id
        cluster_of |= {one.problem_id: shared for one in same}
        if len(set(held)) > 1:  # their clusters are one
            cluster_of = {name: shared if cluster in held else cluster for name, cluster in cluster_of.items()}
    return [dataclasses.replace(problem, cluster_id=cluster_of[problem.problem_id]) for problem in problems]
