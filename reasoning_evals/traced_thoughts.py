"""The thoughts of a run folder, traced attempt by attempt beside their grades."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from reasoning_evals.attempt_judge import AttemptJudge
from reasoning_evals.chance import states, strangers
from reasoning_evals.grading_pass import GradeRow, grade_run, opens_thought, read_grades
from reasoning_evals.problems import LABEL, Problem, read_problems
from reasoning_evals.run_folder import PROBLEMS_FILE, read_generations, read_run
from reasoning_evals.segments import SWITCH_MARKERS
from reasoning_evals.thinking import split_thought
from reasoning_evals.thinking_metrics import ThoughtTrace, candidates, trace_thought

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
    """Whether the right answer is seen in boxes and after "answer is" alone: a formula or a list, not a number."""
    chance: bool | None = None
    """Whether the thought states the target of another problem, the same one in every arm; None where there is none."""

    @property
    def cluster(self) -> tuple[str, str]:
        """Samples that share it are no independent witnesses."""
        row = self.row
        return ("problem", row.problem_id) if row.cluster_id is None else ("cluster", row.cluster_id)


def graded_rows(folder: Path | str) -> list[GradeRow]:
    """Grade a run again. Where problems ask for labels, the verdicts of its classifier are read instead: no grader has others."""
    problems = read_problems(Path(folder) / PROBLEMS_FILE)
    if any(problem.answer_type == LABEL for problem in problems):
        return read_grades(folder)
    return grade_run(folder, problems)


def trace_run(
    folder: Path | str,
    rows: Sequence[GradeRow],
    count_tokens: Callable[[str], int],
    judge: AttemptJudge | None = None,
    markers: Sequence[str] = SWITCH_MARKERS,
    seed: int = 0,
) -> Iterator[TracedSample]:
    """Every sample of a run folder with its thought traced, in the order of the files.

    ``rows``: the run's grades. ``count_tokens`` counts as the run's model does. ``seed`` deals the targets for the chance rate.
    ValueError for a sample without a grade.
    """
    judge = judge or AttemptJudge()
    config = read_run(Path(folder))["config"]
    problems = {problem.problem_id: problem for problem in read_problems(Path(folder) / PROBLEMS_FILE)}
    grades = {(row.arm, row.problem_id, row.sample_idx): row for row in rows}
    unjudged = {name: reason for name, problem in problems.items() if (reason := _why_not(problem, judge))}
    judged = [problem for name, problem in problems.items() if name not in unjudged]
    places = [(problem.problem_id, sample) for problem in judged for sample in range(config["k"])]
    asked = [problem for problem in judged for _ in repeat(None, config["k"])]
    dealt = dict(zip(places, strangers(asked, seed), strict=True))
    boxed_only = {problem.problem_id for problem in judged if _in_boxes_only(problem)}
    for item in read_generations(Path(folder)):
        name, key = item.problem_id, (item.arm, item.problem_id, item.sample_idx)
        if key not in grades:
            raise ValueError(f"{folder} holds a sample of problem {name!r} without a grade: grade the run again")
        row = grades[key]
        thought = split_thought(item.text, opens_thought(config["arms"][item.arm], item.prompt)).thought
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
        stranger = dealt.get((name, item.sample_idx))
        yield TracedSample(
            row=row,
            trace=trace,
            unjudged=unjudged.get(name),
            boxed_only=name in boxed_only,
            chance=None if stranger is None else states(stranger, trace, judge),
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
