"""Problems of the lab families in four splits that share no problem, not even in another wording.

A problem's split is decided by a hash of its family and its numbers only, so the same numbers never occur in two splits
with different wording.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_steer.lab import arithmetic, maths, physics, search
from moe_steer.lab.family import Family, Params, show

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*maths.FAMILIES, *arithmetic.FAMILIES, *physics.FAMILIES)
}
SEARCH_FAMILIES: dict[str, search.SearchFamily] = {family.name: family for family in search.FAMILIES}
"""Families of the lab whose thinking pays."""
SPLITS = {"train": (0, 55), "identification": (55, 70), "tuning": (70, 85), "test": (85, 100)}
"""Half-open ranges of the hash bucket (0-99) that belong to each split."""
MAX_DRAWS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LabProblem:
    """One problem; the fields are those of the evaluation toolkit's problem record."""

    problem_id: str
    prompt: str
    target: str
    answer_type: str
    unit: str | None = None
    cluster_id: str | None = None
    domain: str | None = None
    tolerance: float | None = 0.0
    """Answers are whole or exact, so only the exact value counts."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def content_hash(family: str, params: Params) -> str:
    """Hex digest of a problem's family and numbers, without its wording."""
    return hashlib.sha256(f"{family}:{','.join(str(number) for number in params)}".encode()).hexdigest()


def split_of(family: str, params: Params) -> str:
    """The split to which these numbers belong."""
    bucket = int(content_hash(family, params)[:12], 16) % 100
    return next(split for split, (low, high) in SPLITS.items() if low <= bucket < high)


def draw_params(family: Family, split: str, rng: random.Random) -> Params:
    """Numbers of one problem of the split, drawn with repetition."""
    for _ in range(MAX_DRAWS):
        params = tuple(family.draw(rng))
        if split_of(family.name, params) == split:
            return params
    raise ValueError(f"family {family.name} has no problem in split {split}; widen its range of numbers")


def make_problem(family: Family, params: Params) -> LabProblem:
    """The problem of these numbers; its wording follows from the numbers too, so an id always means the same text."""
    digest = content_hash(family.name, params)
    wordings = family.wordings(params)
    return LabProblem(
        problem_id=f"lab-{split_of(family.name, params)}-{family.name}-{digest[:8]}",
        prompt=wordings[int(digest[12:20], 16) % len(wordings)],
        target=show(family.answer(params)),
        answer_type=family.answer_type,
        unit=family.unit,
        domain=f"{family.domain}/{family.name}",
    )


def generate_problems(
    split: str, num: int, seed: int = 0, families: Mapping[str, Family] = FAMILIES
) -> list[LabProblem]:
    """`num` different problems of a split, families in turn; the same arguments give the same problems.

    Raises ValueError for an unknown split, a negative number, or more problems than a family of the split has.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if num < 0:
        raise ValueError(f"num is {num}: expected 0 or more problems")
    rngs = {name: random.Random(f"{seed}/{split}/{name}") for name in families}
    seen: set[tuple[str, Params]] = set()
    problems: list[LabProblem] = []
    names = list(families)
    for index in range(num):
        family = families[names[index % len(names)]]
        params = _draw_unseen(family, split, rngs[family.name], seen, len(names))
        problems.append(make_problem(family, params))
    return problems


def _draw_unseen(
    family: Family, split: str, rng: random.Random, seen: set[tuple[str, Params]], num_families: int
) -> Params:
    for _ in range(MAX_DRAWS):
        params = draw_params(family, split, rng)
        if (family.name, params) not in seen:
            seen.add((family.name, params))
            return params
    count = sum(name == family.name for name, _ in seen)
    raise ValueError(
        f"split {split} is exhausted: family {family.name} gave {count} different problems and no more were found; "
        f"ask for at most {count * num_families} problems"
    )


def lab_task(split: str = "test", num: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """The task `lab` for evaluation: problems as plain dictionaries."""
    return [problem.to_dict() for problem in generate_problems(split, num, seed)]


def search_task(split: str = "test", num: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """The task `lab-search`: problems of which one of six candidates is the answer, found by trying."""
    return [problem.to_dict() for problem in generate_problems(split, num, seed, SEARCH_FAMILIES)]
