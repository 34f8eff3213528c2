"""The thoughts of a run folder, attempt by attempt, and the measures of one sample's thought.

Every sample is joined with its grade. Measures that ask whether a thought states the right answer come with a control, their
false-positive rate against shuffled targets: how often a thought states the right answer of ANOTHER problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from reasoning_evals.problems import LABEL, Problem
from reasoning_evals.runs import (
    GradeRow,
    grade_run,
    read_generations,
    read_grades,
    read_run,
    run_problems,
    run_thoughts,
)
from reasoning_evals.thoughts.metrics import (
    AttemptJudge,
    Judge,
    ThoughtTrace,
    distinct_efficiency,
    oe_rule,
    trace_thought,
    ut_rule,
)
from reasoning_evals.thoughts.segments import SWITCH_MARKERS, candidates

LABELS = "problems that ask for a label, which no thought states"
UNREADABLE = "problems with a target that no grader can read"


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedSample:
    """One sample of a run: its grade, and its thought attempt by attempt."""

    row: GradeRow
    trace: ThoughtTrace | None
    """None where the sample holds no thought."""
    unjudged: str | None = None
    """Why no answer that the thought states can be judged, ``LABELS`` or ``UNREADABLE``; None where it can."""
    boxed_only: bool = False
    """Whether only boxes and phrases like "answer is" can show the right answer, because it is a formula or a list."""
    states_shuffled_target: bool | None = None
    """False-positive control: whether the thought states the target of another problem (the same one in every arm); None where
    there is no other target."""

    @property
    def cluster(self) -> tuple[str, str]:
        """Samples of one cluster are not independent observations."""
        row = self.row
        return ("problem", row.problem_id) if row.cluster_id is None else ("cluster", row.cluster_id)


def graded_rows(folder: Path | str) -> list[GradeRow]:
    """Grade a run again. Where problems ask for labels, the stored verdicts of its classifier are read: no grader can judge
    labels."""
    problems = run_problems(Path(folder))
    if any(problem.answer_type == LABEL for problem in problems):
        return read_grades(folder)
    return grade_run(folder, problems)


def trace_run(
    folder: Path | str,
    rows: Sequence[GradeRow],
    count_tokens: Callable[[str], int],
    judge: AttemptJudge | None = None,
    markers: Sequence[str] = SWITCH_MARKERS,
) -> Iterator[TracedSample]:
    """Every sample of a run folder with its thought traced, in the order of the files.

    ``rows``: the run's grades. ``count_tokens`` counts as the run's model does.
    ValueError for a sample without a grade.
    """
    judge = judge or AttemptJudge()
    config = read_run(Path(folder))["config"]
    problems = {problem.problem_id: problem for problem in run_problems(Path(folder))}
    grades = {(row.arm, row.problem_id, row.sample_idx): row for row in rows}
    unjudged = {name: reason for name, problem in problems.items() if (reason := _why_not(problem, judge))}
    judged = [problem for name, problem in problems.items() if name not in unjudged]
    places = [(problem.problem_id, sample) for problem in judged for sample in range(config["k"])]
    asked = [problem for problem in judged for _ in repeat(None, config["k"])]
    dealt = dict(zip(places, shuffled_targets(asked), strict=True))
    boxed_only = {problem.problem_id for problem in judged if _in_boxes_only(problem)}
    readers = run_thoughts(config)
    for item in read_generations(Path(folder)):
        name, key = item.problem_id, (item.arm, item.problem_id, item.sample_idx)
        if key not in grades:
            raise ValueError(f"{folder} holds a sample of problem {name!r} without a grade: grade the run again")
        row = grades[key]
        thought = readers[item.arm].split(item.text, item.prompt).thought
        if not thought:
            yield TracedSample(row=row, trace=None, unjudged=unjudged.get(name), boxed_only=name in boxed_only)
            continue
        trace = trace_thought(
            problems[name],
            thought,
            row.correct,
            count_tokens,
            markers=markers,
            judge=_nothing if name in unjudged else judge,
        )
        shuffled = dealt.get((name, item.sample_idx))
        yield TracedSample(
            row=row,
            trace=trace,
            unjudged=unjudged.get(name),
            boxed_only=name in boxed_only,
            states_shuffled_target=None if shuffled is None else states(shuffled, trace, judge),
        )


def _why_not(problem: Problem, judge: AttemptJudge) -> str | None:
    if problem.answer_type == LABEL:
        return LABELS
    return None if judge.reads_target(problem) else UNREADABLE


def _in_boxes_only(problem: Problem) -> bool:
    """Whether the rule would miss the right answer at the end of an equation."""
    return problem.answer_type != "choice" and not candidates(f"= {problem.target}\n", problem.answer_type)


def _nothing(problem: Problem, answer: str) -> bool:
    return False


def shuffled_targets(problems: Sequence[Problem], seed: int = 0) -> list[Problem | None]:
    """Each problem with the target (and unit) of another problem of the same answer type, drawn at random, never an equal one.

    None for a problem whose answer type has no other target. The same problem may be listed several times, once a sample:
    each occurrence is drawn anew.

    Why: a long thought states many numbers, and one may equal the target by chance. The share of thoughts that "state" a
    shuffled target is the false-positive rate of that measure: if it is high, a stated right answer proves nothing.
    """
    generator = random.Random(seed)
    distinct = list({problem.problem_id: problem for problem in problems}.values())
    others: dict[tuple[str, str], list[Problem]] = {}
    shuffled: list[Problem | None] = []
    for problem in problems:
        answer_type, target = key = (problem.answer_type, problem.target)
        if key not in others:
            others[key] = [item for item in distinct if item.answer_type == answer_type and item.target != target]
        other = generator.choice(others[key]) if others[key] else None
        shuffled.append(None if other is None else replace(problem, target=other.target, unit=other.unit))
    return shuffled


def states(problem: Problem, trace: ThoughtTrace, judge: Judge) -> bool:
    """Whether any attempt states the problem's target."""
    return any(judge(problem, answer) for attempt in trace.attempts for answer in attempt.stated)


class ThinkingMeasure(NamedTuple):
    """One column of the summary."""

    name: str
    kind: str
    """share (0 to 1), tokens or count."""
    of: Callable[[TracedSample], float | None]
    """Its value for a sample; None where it does not apply."""


def _judged(rule: Callable[[ThoughtTrace], float | None]) -> Callable[[TracedSample], float | None]:
    """A rule over attempts, for thoughts whose stated answers can be judged."""
    return lambda sample: None if sample.trace is None or sample.unjudged else rule(sample.trace)


def _thinking_tokens(sample: TracedSample) -> float:
    """The number that was generated; counted in the text where the sampler did not know the thinking tags."""
    if sample.row.thinking_tokens is not None:
        return sample.row.thinking_tokens
    return sample.trace.tokens if sample.trace else 0


def _underthinking(sample: TracedSample) -> float | None:
    """For incorrect responses only. An answer on which the grader failed is not known to be incorrect."""
    if (
        sample.trace is None
        or sample.unjudged
        or sample.row.outcome not in ("wrong", "no_answer", "cut", "unclosed", "truncated")
    ):
        return None
    return ut_rule([sample.trace])


MEASURES = (
    ThinkingMeasure("accuracy", "share", lambda sample: sample.row.correct),
    ThinkingMeasure("thinking_tokens", "tokens", _thinking_tokens),
    ThinkingMeasure("closed", "share", lambda sample: sample.row.state in ("closed", "empty")),
    ThinkingMeasure("truncated", "share", lambda sample: sample.row.outcome in ("truncated", "unclosed")),
    ThinkingMeasure("attempts", "count", lambda sample: len(sample.trace.attempts) if sample.trace else None),
    ThinkingMeasure("stated", "share", _judged(lambda trace: trace.first_correct_token is not None)),
    ThinkingMeasure("chance", "share", lambda sample: sample.states_shuffled_target),
    ThinkingMeasure("first_right_at", "tokens", _judged(lambda trace: trace.first_correct_token)),
    ThinkingMeasure("tokens_after_first_right", "tokens", _judged(lambda trace: trace.tokens_after_first_correct)),
    ThinkingMeasure("outcome_efficiency", "share", _judged(lambda trace: oe_rule([trace]))),
    ThinkingMeasure("new_answer_share", "share", _judged(lambda trace: distinct_efficiency([trace]))),
    ThinkingMeasure("underthinking", "share", _underthinking),
    ThinkingMeasure("answer_changes", "count", _judged(lambda trace: trace.answer_changes)),
    ThinkingMeasure("right_to_wrong", "count", _judged(lambda trace: trace.correct_to_wrong)),
    ThinkingMeasure("revisit_rate", "share", _judged(lambda trace: trace.revisit_rate)),
)
"""From "attempts" on: samples with a thought only; first_right_at and tokens_after_first_right: thoughts that state the right
answer only. "chance" is the false-positive rate of "stated". The rules are in ``metrics``."""
