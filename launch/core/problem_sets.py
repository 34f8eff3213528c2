"""The three sets of problems of a run: to find experts or directions on, to tune on, to compare on. They never overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from launch.core.options import PARTS, SplitOptions
from launch.core.prompt_options import own_wording
from moe_steer.lab import is_made_up
from reasoning_evals import Problem, load_task

_SHARES = {"identification": 0.25, "tuning": 0.25}  # of a task without splits of its own; the rest is for the test


class ProblemSets(NamedTuple):
    """Problems by purpose. Where nothing is searched the first two are empty."""

    identification: list[Problem]
    tuning: list[Problem]
    test: list[Problem]


def problem_sets(options: SplitOptions) -> ProblemSets:
    """Load the problems and cut them up; ValueError when there are too few, or when a part would overlap another."""
    if is_made_up(options.problems):
        parts = ("test",) if options.test_only else PARTS
        made = {
            part: load_task(options.problems, split=part, num=options.size(part), seed=options.seed) for part in parts
        }
    else:
        everything = load_task(
            options.problems, data_dir=options.data_dir, **own_wording(options.problems, options.wording)
        )
        made = {"test": everything} if options.test_only else cut(everything, options.seed)
        for part, problems in made.items():
            asked = getattr(options, f"num_{part}")
            if asked is not None and asked > len(problems):
                raise ValueError(
                    f"{options.problems!r} leaves {len(problems)} {part} problems, {asked} were asked for: give more problems, or lower --num-{part}"
                )
        made = {part: problems[: options.size(part)] for part, problems in made.items()}
    sets = ProblemSets(*(made.get(part, []) for part in PARTS))
    for part in PARTS if not options.test_only else ("test",):
        if not made.get(part):
            raise ValueError(f"{options.problems!r} leaves no {part} problems: give more problems")
    if len(sets.test) < 2:
        raise ValueError(f"{options.problems!r} leaves 1 test problem, and a comparison needs 2: give more problems")
    refuse_overlap(sets)
    return sets


def cut(problems: Sequence[Problem], seed: int) -> dict[str, list[Problem]]:
    """Cut problems into identification, tuning and test, by hash of seed and id: adding problems moves no other problem's
    place in the order. Problems of one cluster stay together."""

    def place(problem: Problem) -> str:
        return hashlib.sha256(f"{seed}:{problem.cluster_id or problem.problem_id}".encode()).hexdigest()

    ordered = sorted(problems, key=lambda problem: (place(problem), problem.problem_id))
    result: dict[str, list[Problem]] = {}
    start = 0
    for part in ("identification", "tuning"):
        stop = start + round(_SHARES[part] * len(ordered))
        while (
            0 < stop < len(ordered)
            and ordered[stop - 1].cluster_id
            and ordered[stop - 1].cluster_id == ordered[stop].cluster_id
        ):
            stop += 1
        result[part] = ordered[start:stop]
        start = stop
    result["test"] = ordered[start:]
    return result


def refuse_overlap(sets: ProblemSets) -> None:
    """ValueError when two parts share a problem, by id or by text."""
    seen: dict[str, str] = {}
    for part, problems in zip(PARTS, sets, strict=True):
        for problem in problems:
            for key in (problem.problem_id, problem.prompt):
                if seen.setdefault(key, part) != part:
                    raise ValueError(
                        f"problem {problem.problem_id!r} is in the {seen[key]} and in the {part} set: keep them apart"
                    )
