"""From a run folder to a Report: plain records that contain everything which is rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasoning_evals.comparing import (
    Comparison,
    Flip,
    PairSummary,
    compare_arms,
    unanswered_notes,
)
from reasoning_evals.problems import Problem
from reasoning_evals.runs import (
    Completion,
    GradeRow,
    arm_thoughts,
    gates_text,
    read_audit,
    read_generations,
    read_grades,
    read_run,
    run_problems,
)

MAX_CHARACTERS = 20_000
TRACES_PAGE = "traces.html"
"""Beside the pages of a run, where answers can be read token by token."""
_SampleKey = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One arm's sample in an example."""

    arm: str
    sample_idx: int
    outcome: str
    extracted: str | None
    reason: str
    total_tokens: int
    thought: str
    thought_length: int
    """Characters of the whole thought, of which ``thought`` may be the beginning."""
    answer: str
    gates: str
    """What the gated entries of its plan did in it; "" without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A problem that one arm solved more often, with one sample of each arm."""

    problem_id: str
    question: str
    target: str
    rate_a: float
    rate_b: float
    a: Side
    b: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemOutcome:
    """One problem in one arm, averaged over its samples."""

    problem_id: str
    accuracy: float
    total_tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table from the caller; the first column is the name of the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
        """A row for each item. ``columns``: head -> the cell of an item."""
        return cls(head=[*columns], rows=[[cell(item) for cell in columns.values()] for item in items])


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is rendered."""

    title: str
    comparison: Comparison
    problems: Mapping[str, Sequence[ProblemOutcome]]
    """Arm -> problems, in the same order in every arm."""
    lengths: Mapping[str, Sequence[int]]
    """Arm -> thinking tokens of every sample (total tokens where thoughts were not measured)."""
    lengths_are_thoughts: bool
    gained: Sequence[Example] = ()
    """Examples of the first pair, largest change first; may be fewer than the comparison counts."""
    lost: Sequence[Example] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """Title -> SVG text, from the caller."""
    audit: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Arm -> audit rows."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """More lines for the head, such as model and plan, from the caller."""

    above: Sequence[str] = ()
    """Notes above the verdict, which they leave in its place: what the arms rest on, responses without an answer."""
    headline: Sequence[str] = ()
    """Sentences that come before those of the pairs, for questions other than accuracy."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Title -> table, from the caller; placed before the table of arms."""
    read_again: Sequence[str] = ()
    """Sentences on the same samples cut at lower token limits, after the verdicts."""

    traces_page: str = ""
    """File beside the pages in which traces can be read token by token; "" for none."""

    def audit_columns(self) -> list[str]:
        """The fields of the audit rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for rows in self.audit.values() for row in rows for name in row))

    def audit_rows(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(arm, row), arms in the order of the comparison."""
        arms = [arm.name for arm in self.comparison.arms]
        ordered = sorted(self.audit, key=lambda name: (arms.index(name) if name in arms else len(arms), name))
        return [(name, row) for name in ordered for row in self.audit[name]]


def build_report(
    run_dir: Path | str,
    comparison: Comparison | None = None,
    title: str | None = None,
    figures: Mapping[str, str] | None = None,
    audit: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    facts: Mapping[str, str] | None = None,
    max_examples: int = 6,
) -> Report:
    """Collect a report from a graded run folder.

    ``comparison`` (default: all arms of the folder), ``audit`` (default: the folder's own), ``figures`` (title -> SVG) and
    ``facts`` (lines for the head) come from the caller. ``max_examples``: limit of the gained and of the lost problems that
    are shown. Texts beyond 20,000 characters are cut, with a note. ValueError when the folder is not graded.
    """
    folder = Path(run_dir)
    run = read_run(folder)
    grades = read_grades(folder)
    compared = comparison or compare_arms(grades, baseline=_first_arm(run))
    told = read_audit(folder)
    gained, lost = _examples(folder, run, compared, grades, told.gates, max_examples)
    measured = all(row.thinking_tokens is not None for row in grades)
    return Report(
        title=title or f"{compared.task}: {' against '.join(arm.name for arm in reversed(compared.arms[:2]))}",
        comparison=compared,
        problems={arm.name: _outcomes(arm.name, grades) for arm in compared.arms},
        lengths={
            arm.name: tuple(
                (row.thinking_tokens if row.thinking_tokens is not None and measured else row.total_tokens)
                for row in grades
                if row.arm == arm.name
            )
            for arm in compared.arms
        },
        lengths_are_thoughts=measured,
        gained=gained,
        lost=lost,
        figures=figures or {},
        audit=told.rows if audit is None else audit,
        run=run,
        facts=facts or {},
        above=unanswered_notes(grades),
    )


def _first_arm(run: Mapping[str, Any]) -> str:
    names: list[str] = run["config"]["arm_order"]
    return "baseline" if "baseline" in names else names[0]


def _outcomes(arm: str, grades: Sequence[GradeRow]) -> tuple[ProblemOutcome, ...]:
    samples: dict[str, list[GradeRow]] = {}
    for row in grades:
        if row.arm == arm:
            samples.setdefault(row.problem_id, []).append(row)
    return tuple(
        ProblemOutcome(
            problem_id=name,
            accuracy=sum(row.correct for row in rows) / len(rows),
            total_tokens=sum(row.total_tokens for row in rows) / len(rows),
        )
        for name, rows in samples.items()
    )


def _examples(
    folder: Path,
    run: Mapping[str, Any],
    comparison: Comparison,
    grades: Sequence[GradeRow],
    gates: Mapping[_SampleKey, Sequence[Mapping[str, Any]]],
    max_examples: int,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    if not comparison.pairs:
        return (), ()
    pair = comparison.pairs[0]
    gained, lost = pair.gained[:max_examples], pair.lost[:max_examples]
    wanted = {key for flip in (*gained, *lost) for key in _keys(pair, flip)}
    texts: dict[_SampleKey, Completion] = {}
    for completion in read_generations(folder):
        key = (completion.arm, completion.problem_id, completion.sample_idx)
        if key in wanted:
            texts[key] = completion
    rows = {(row.arm, row.problem_id, row.sample_idx): row for row in grades}
    problems = {problem.problem_id: problem for problem in run_problems(folder)}

    def example(flip: Flip) -> Example:
        problem: Problem = problems[flip.problem_id]
        a, b = (
            _side(rows[key], texts[key], run["config"]["arms"][key[0]], gates.get(key, ())) for key in _keys(pair, flip)
        )
        return Example(
            problem_id=flip.problem_id,
            question=problem.prompt,
            target=f"{problem.target} {problem.unit}" if problem.unit else problem.target,
            rate_a=flip.rate_a,
            rate_b=flip.rate_b,
            a=a,
            b=b,
        )

    return tuple(map(example, gained)), tuple(map(example, lost))


def _keys(pair: PairSummary, flip: Flip) -> tuple[_SampleKey, _SampleKey]:
    return (pair.a, flip.problem_id, flip.sample_a), (pair.b, flip.problem_id, flip.sample_b)


def _side(row: GradeRow, completion: Completion, arm: Mapping[str, Any], acts: Sequence[Mapping[str, Any]]) -> Side:
    thought = arm_thoughts(arm).split(completion.text, completion.prompt)
    return Side(
        arm=row.arm,
        sample_idx=row.sample_idx,
        outcome=row.outcome,
        extracted=row.extracted,
        reason=row.reason,
        total_tokens=row.total_tokens,
        thought=_cut(thought.thought),
        thought_length=len(thought.thought),
        answer=_cut(thought.answer),
        gates=gates_text(acts),
    )


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}\n[... cut here, {len(text) - MAX_CHARACTERS:,} more characters]"
