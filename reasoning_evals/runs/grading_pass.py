"""The grading pass over all samples of a run: no randomness, repeatable; a missing sample is an error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from moe_steer.console import tracked
from moe_steer.files import write_whole
from moe_steer.json_files import check_types, parse_json, quoted, short
from reasoning_evals.problems import LABEL, Problem
from reasoning_evals.runs.completions import ArmThoughts, Completion, json_line, run_thoughts
from reasoning_evals.runs.run_folder import GRADES_FILE, read_generations, read_run, refuse_job, run_problems
from reasoning_evals.thinking import Thought, TokenCounts


class Judgement(Protocol):
    """A grader's verdict: see ``Grade``."""

    @property
    def outcome(self) -> str:
        """correct, wrong, no_answer, truncated or grader_error; of a run also unclosed and cut."""

    @property
    def extracted(self) -> str | None:
        """The answer that was judged."""

    @property
    def reason(self) -> str:
        """Why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradeRow:
    """One sample, judged and measured."""

    arm: str
    task: str
    problem_id: str
    sample_idx: int
    outcome: str
    """correct, wrong, no_answer, cut, unclosed, truncated or grader_error."""
    extracted: str | None
    reason: str
    method: str
    """How the answer was found."""
    state: str
    """Of the thought: closed, truncated, none or empty."""
    finish_reason: str
    """stop, length or content_filter."""
    thinking_tokens: int | None
    """Generated tokens inside the thought; None when the sampler does not know the ids of the thinking tags."""
    answer_tokens: int | None
    total_tokens: int
    """All generated tokens, including tags and stop token."""
    domain: str | None = None
    cluster_id: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the sample counts as solved."""
        return self.outcome == "correct"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> GradeRow:
        """ValueError when keys are missing or unknown, or a value has another type."""
        if not isinstance(row, dict):
            raise ValueError(f"not a grade: {quoted(row)}")
        check_types(row, "not a grade", _TYPES)
        try:
            return cls(**row)
        except TypeError as error:
            raise ValueError(f"not a grade: {short(error)}") from error


_TYPES = get_type_hints(GradeRow)


def grade_run(
    out_dir: Path | str,
    problems: Sequence[Problem] | None = None,
    grade: Callable[[Problem, Thought], Judgement] | None = None,
) -> list[GradeRow]:
    """Judge every sample of a run folder and write grades.jsonl.

    Rows are ordered by arm, problem and sample, in the order of the run. ``problems`` (default: the folder's own) must be
    those of the run; their targets may have been corrected. ``grade(problem, thought)`` is the grader of a completion
    that is split already (default: ``reasoning_evals.grading.grade_thought``). ValueError with their number when samples are missing.
    """
    folder = Path(out_dir)
    config = read_run(folder)["config"]
    refuse_job(folder)
    given = run_problems(folder) if problems is None else problems
    by_id = {problem.problem_id: problem for problem in given}
    if len(by_id) != config["num_problems"]:
        raise ValueError(f"{folder} is a run over {config['num_problems']} problems, {len(by_id)} are given: give all")
    judge = grade or _default_judge()
    readers = run_thoughts(config)
    rows: dict[tuple[str, str, int], GradeRow] = {}
    number = len(config["arm_order"]) * len(by_id) * config["k"]
    for completion in tracked(read_generations(folder), "grading", total=number):
        problem = by_id.get(completion.problem_id)
        if problem is None:
            raise ValueError(
                f"{folder} holds a sample of problem {completion.problem_id!r}, which is not among the problems"
            )
        row = judge_one(completion, problem, judge, readers[completion.arm])
        rows[row.arm, row.problem_id, row.sample_idx] = row
    expected = [(arm, name, j) for arm in config["arm_order"] for name in by_id for j in range(config["k"])]
    if missing := [key for key in expected if key not in rows]:
        raise ValueError(
            f"{folder} has {len(rows)} of {len(expected)} samples, {len(missing)} are missing (first: {missing[0]}): run it again, it "
            "continues where it was"
        )
    ordered = [rows[key] for key in expected]
    if os.access(folder, os.W_OK):  # the folder may be on a read-only disk: its results can still be read
        write_whole(folder / GRADES_FILE, "".join(json_line(row.to_dict()) + "\n" for row in ordered))
    return ordered


def read_grades(out_dir: Path | str) -> list[GradeRow]:
    """The rows that ``grade_run`` wrote; ValueError when the folder has none."""
    path = Path(out_dir) / GRADES_FILE
    if not path.exists():
        raise ValueError(f"{out_dir} has no {GRADES_FILE}: grade the run first")
    with path.open("rb") as file:
        return list(_parse(file, path))


def _parse(lines: Iterable[bytes], path: Path) -> Iterator[GradeRow]:
    remedy = "delete the file and grade the run again"
    for number, line in enumerate(lines, 1):
        row = parse_json(line, f"{path}:{number}", remedy, surrogates=True)
        try:
            yield GradeRow.from_dict(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}: {remedy}") from error


def judge_one(
    completion: Completion, problem: Problem, judge: Callable[[Problem, Thought], Judgement], reader: ArmThoughts
) -> GradeRow:
    """A completion, judged and measured. ``reader``: how its arm is read (``arm_thoughts``)."""
    thought = reader.split(completion.text, completion.prompt)
    verdict = judge(problem, thought)
    outcome, reason = _told_apart(problem, verdict, thought, completion.finish_reason)
    counts = _counts(completion, thought, reader)
    return GradeRow(
        arm=completion.arm,
        task=completion.task,
        problem_id=completion.problem_id,
        sample_idx=completion.sample_idx,
        outcome=outcome,
        extracted=verdict.extracted,
        reason=reason,
        method=getattr(verdict, "method", ""),
        state=thought.state,
        finish_reason=completion.finish_reason,
        thinking_tokens=counts.thinking if counts else None,
        answer_tokens=counts.answer if counts else None,
        total_tokens=completion.total_tokens,
        domain=problem.domain,
        cluster_id=problem.cluster_id,
    )


def _counts(completion: Completion, thought: Thought, reader: ArmThoughts) -> TokenCounts | None:
    """Tokens of thought and answer: from the ids, else by the endpoint's own count; None where nobody knows."""
    stopped = completion.finish_reason == "stop"
    if completion.token_ids:
        counts = reader.count_tokens(completion.token_ids, completion.prompt, completion.text, stopped)
        if counts is not None:
            return counts
    total, thinking = completion.total_tokens, completion.num_thinking
    if thought.state == "none" and not completion.token_ids:
        thinking = thinking or 0  # more than 0: a thought that the endpoint counts and does not show
    elif thinking == 0 and thought.thought.strip():
        thinking = None  # a thought has tokens: the endpoint says 0 because it does not count them
    return None if thinking is None else TokenCounts(thinking, max(0, total - thinking), total)


def _told_apart(problem: Problem, verdict: Judgement, thought: Thought, finish_reason: str) -> tuple[str, str]:
    """Outcome and reason, with what the text alone does not show: whether the response ended by itself.

    The last number of a text that was cut is no answer: nobody knows what the model would have said next.
    """
    if problem.answer_type == LABEL:
        return verdict.outcome, verdict.reason
    stopped = finish_reason == "stop"
    if thought.state == "truncated" and stopped and verdict.outcome == "truncated":
        return "unclosed", "the response ended by itself inside a thought that never closes"
    guessed = verdict.outcome == "no_answer" or getattr(verdict, "method", "").startswith("last")
    if finish_reason == "content_filter" and (guessed or verdict.outcome == "truncated"):
        return "no_answer", "the endpoint's content filter ended the response before an answer was stated"
    if not stopped and guessed and verdict.outcome in ("correct", "wrong", "no_answer"):
        return "cut", "the token limit came before an answer was stated"
    return verdict.outcome, verdict.reason


def _default_judge() -> Callable[[Problem, Thought], Judgement]:
    from reasoning_evals.grading import grade_thought  # heavy: only a real grading pass needs it

    return grade_thought
