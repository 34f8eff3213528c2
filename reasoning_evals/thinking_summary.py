"""Over- and underthinking of every arm of a run: the rules of ``thinking_metrics`` over its samples, with intervals.

Thoughts of one problem are no independent witnesses, so intervals are clustered by problem (or by the problem's own cluster).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from reasoning_evals.grading_pass import GradeRow, opens_thought
from reasoning_evals.problems import Problem, read_problems
from reasoning_evals.run_folder import PROBLEMS_FILE, read_generations, read_run
from reasoning_evals.segments import SWITCH_MARKERS
from reasoning_evals.statistics import Estimate, PairedDifference, mean_estimate, paired_difference
from reasoning_evals.thinking import split_thought
from reasoning_evals.thinking_metrics import (
    Judge,
    ThoughtTrace,
    chance_rate,
    oe_rule,
    process_efficiency,
    trace_thought,
    ut_rule,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thought:
    """The thought of one sample."""

    arm: str
    problem: Problem
    text: str
    trace: ThoughtTrace

    @property
    def cluster(self) -> Hashable:
        """What its sampling errors are shared with."""
        return self.problem.cluster_id or self.problem.problem_id


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmThinking:
    """One arm. None: no thought, or too few problems with one, to say it."""

    arm: str
    num_samples: int
    num_thoughts: int
    num_wrong: int
    """Thoughts whose response is wrong: those that ``underthinking`` is about."""
    tokens: Estimate | None
    """Of a thought."""
    attempts: Estimate | None
    """Of a thought: pieces between words of changed mind."""
    stated: Estimate | None
    """Share of thoughts that state the right answer anywhere."""
    chance: float | None
    """The same share for the target of another problem: how often "stated" means nothing."""
    outcome_efficiency: Estimate | None
    process_efficiency: Estimate | None
    underthinking: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingChange:
    """An arm minus the baseline, over the problems that have thoughts in both; None where they are fewer than two."""

    arm: str
    baseline: str
    outcome_efficiency: PairedDifference | None
    process_efficiency: PairedDifference | None


def thoughts_of_run(
    folder: Path | str,
    rows: Sequence[GradeRow],
    count_tokens: Callable[[str], int],
    judge: Judge,
    markers: Sequence[str] = SWITCH_MARKERS,
) -> Iterator[Thought | None]:
    """The thought of every sample of a run folder, None for a sample without one; ``rows``: its grades. In the order of the files."""
    config = read_run(Path(folder))["config"]
    problems = {problem.problem_id: problem for problem in read_problems(Path(folder) / PROBLEMS_FILE)}
    correct = {(row.arm, row.problem_id, row.sample_idx): row.correct for row in rows}
    for item in read_generations(Path(folder)):
        thought = split_thought(item.text, opens_thought(config["arms"][item.arm], item.prompt)).thought
        if not thought:
            yield None
            continue
        problem = problems[item.problem_id]
        right = correct[item.arm, item.problem_id, item.sample_idx]
        trace = trace_thought(problem, thought, right, count_tokens, markers=markers, judge=judge)
        yield Thought(arm=item.arm, problem=problem, text=thought, trace=trace)


def arm_thinking(arm: str, num_samples: int, thoughts: Sequence[Thought], judge: Judge) -> ArmThinking:
    """The rules over the thoughts of one arm. The means are those of ``oe_rule``, ``process_efficiency`` and ``ut_rule``."""
    wrong = [item for item in thoughts if not item.trace.correct and item.trace.tokens]
    return ArmThinking(
        arm=arm,
        num_samples=num_samples,
        num_thoughts=len(thoughts),
        num_wrong=len(wrong),
        tokens=_estimate(thoughts, lambda trace: trace.tokens),
        attempts=_estimate(thoughts, lambda trace: len(trace.attempts)),
        stated=_estimate(thoughts, lambda trace: trace.first_correct_token is not None),
        chance=chance_rate([item.problem for item in thoughts], [item.text for item in thoughts], judge=judge),
        outcome_efficiency=_estimate(thoughts, lambda trace: oe_rule([trace])),
        process_efficiency=_estimate(thoughts, lambda trace: process_efficiency([trace])),
        underthinking=_estimate(wrong, lambda trace: ut_rule([trace])),
    )


def thinking_change(arm: str, baseline: str, thoughts: Sequence[Thought]) -> ThinkingChange:
    """Differences of the means of each problem's thoughts; ``thoughts``: of all arms."""
    pairs: dict[str, PairedDifference | None] = {}
    for name, rule in (("outcome_efficiency", oe_rule), ("process_efficiency", process_efficiency)):
        a, b = (_by_problem([item for item in thoughts if item.arm == each], rule) for each in (baseline, arm))
        common = sorted(a.keys() & b.keys())
        clusters = {item.problem.problem_id: item.cluster for item in thoughts}
        groups = [clusters[key] for key in common]
        grouped = groups if len(set(groups)) < len(groups) else None
        pairs[name] = (
            paired_difference([a[key] for key in common], [b[key] for key in common], grouped)
            if len(set(groups)) > 1
            else None
        )
    return ThinkingChange(arm=arm, baseline=baseline, **pairs)


def thinking_json(arms: Sequence[ArmThinking], changes: Sequence[ThinkingChange]) -> dict[str, Any]:
    """Plain values, without rounding."""
    return {"arms": [_plain(arm) for arm in arms], "changes": [_plain(change) for change in changes]}


def _plain(record: ArmThinking | ThinkingChange) -> dict[str, Any]:
    values = asdict(record)
    for name in values:
        value = getattr(record, name)
        if isinstance(value, (Estimate, PairedDifference)):
            values[name] = value._asdict()
    return values


def _estimate(thoughts: Sequence[Thought], value: Callable[[ThoughtTrace], float | None]) -> Estimate | None:
    found = [(number, item.cluster) for item in thoughts if (number := value(item.trace)) is not None]
    if len({cluster for _, cluster in found}) < 2:
        return None
    return mean_estimate([float(number) for number, _ in found], [cluster for _, cluster in found])


def _by_problem(
    thoughts: Sequence[Thought], rule: Callable[[Sequence[ThoughtTrace]], float | None]
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for item in thoughts:
        value = rule([item.trace])
        if value is not None:
            values.setdefault(item.problem.problem_id, []).append(value)
    return {name: fmean(found) for name, found in values.items()}
