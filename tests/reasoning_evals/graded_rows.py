"""Graded samples made up for the tests of comparison and report."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean

from reasoning_evals.problems import Problem
from reasoning_evals.runs.grading_pass import GradeRow
from reasoning_evals.thoughts.metrics import Judge, ThoughtTrace, judge_by_rule
from reasoning_evals.thoughts.traced import shuffled_targets, states


def row(arm: str, problem: str, sample: int, correct: bool, tokens: int = 50, **changes: object) -> GradeRow:
    values: dict[str, object] = {
        "arm": arm,
        "task": "demo",
        "problem_id": problem,
        "sample_idx": sample,
        "outcome": "correct" if correct else "wrong",
        "extracted": "1" if correct else "2",
        "reason": "equal" if correct else "differs",
        "method": "box",
        "state": "closed",
        "finish_reason": "stop",
        "thinking_tokens": tokens - 10,
        "answer_tokens": 8,
        "total_tokens": tokens,
        "domain": "maths" if problem[-1] in "02468" else "physics",
        "cluster_id": None,
    }
    return GradeRow(**{**values, **changes})  # type: ignore[arg-type]


def table(patterns: Mapping[str, Sequence[str]]) -> list[GradeRow]:
    """arm -> one pattern a problem, such as "110" for three samples; "t" truncated, "n" no answer, "e" grader error."""
    special = {"t": "truncated", "n": "no_answer", "e": "grader_error"}
    rows = []
    for arm, problems in patterns.items():
        for index, pattern in enumerate(problems):
            for sample, letter in enumerate(pattern):
                made = row(arm, f"p{index}", sample, letter == "1", tokens=40 + 3 * index + sample)
                if letter in special:
                    made = row(arm, f"p{index}", sample, False, 90, outcome=special[letter], extracted=None)
                rows.append(made)
    return rows


def simulated(num_problems: int, k: int, effects: Mapping[str, float], seed: int = 0) -> list[GradeRow]:
    """Arms whose accuracy and length differ by the given effect from a common base."""
    dice = random.Random(seed)
    bases = [dice.betavariate(2, 1.5) for _ in range(num_problems)]
    rows = []
    for arm, effect in effects.items():
        for index, base in enumerate(bases):
            for sample in range(k):
                correct = dice.random() < min(1, max(0, base + effect))
                tokens = int(dice.lognormvariate(4 + effect, 0.5)) + 12
                made = row(arm, f"p{index}", sample, correct, tokens)
                if dice.random() < 0.04:
                    made = row(
                        arm, f"p{index}", sample, False, 300, outcome="truncated", extracted=None, state="truncated"
                    )
                rows.append(made)
    return rows


def false_positive_rate(
    problems: Sequence[Problem], traces: Sequence[ThoughtTrace], seed: int = 0, judge: Judge | None = None
) -> float | None:
    """Share of thoughts in which a shuffled target is stated, among all answers that their attempts state.

    ``problems``: of each thought. None where no thought can be given another target; see ``shuffled_targets``.
    """
    if len(problems) != len(traces):
        raise ValueError(f"{len(problems)} problems and {len(traces)} thoughts: expected one thought for each")
    judge = judge or judge_by_rule
    hits = [
        states(shuffled, trace, judge)
        for shuffled, trace in zip(shuffled_targets(problems, seed), traces, strict=True)
        if shuffled is not None
    ]
    return fmean(hits) if hits else None
