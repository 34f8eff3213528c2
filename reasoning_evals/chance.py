"""How often a thought states the right answer of ANOTHER problem: then a right one means nothing either."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from reasoning_evals.problems import Problem
from reasoning_evals.thinking_metrics import Judge, ThoughtTrace, judge_by_rule


def chance_rate(
    problems: Sequence[Problem], traces: Sequence[ThoughtTrace], seed: int = 0, judge: Judge | None = None
) -> float | None:
    """Share of thoughts in which a stranger's target is stated, among all answers that their attempts state.

    ``problems``: of each thought. None where no thought can be given another target; see ``strangers``.
    """
    if len(problems) != len(traces):
        raise ValueError(f"{len(problems)} problems and {len(traces)} thoughts: expected one thought for each")
    judge = judge or judge_by_rule
    hits = [
        states(stranger, trace, judge)
        for stranger, trace in zip(strangers(problems, seed), traces, strict=True)
        if stranger is not None
    ]
    return fmean(hits) if hits else None


def strangers(problems: Sequence[Problem], seed: int = 0) -> list[Problem | None]:
    """Every problem with the target of another one of the same answer type, drawn at random, never an equal target.

    None for a problem that is alone with its target. A problem may stand there once a sample: each place is drawn anew.
    """
    generator = random.Random(seed)
    distinct = list({problem.problem_id: problem for problem in problems}.values())
    others: dict[tuple[str, str], list[Problem]] = {}
    found: list[Problem | None] = []
    for problem in problems:
        kind = (problem.answer_type, problem.target)
        if kind not in others:
            others[kind] = [one for one in distinct if one.answer_type == kind[0] and one.target != kind[1]]
        other = generator.choice(others[kind]) if others[kind] else None
        found.append(None if other is None else replace(problem, target=other.target, unit=other.unit))
    return found


def states(problem: Problem, trace: ThoughtTrace, judge: Judge) -> bool:
    """Whether any attempt states the problem's target."""
    return any(judge(problem, answer) for attempt in trace.attempts for answer in attempt.stated)
