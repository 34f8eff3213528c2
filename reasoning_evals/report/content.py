"""What a report shows. Plain records: rendering reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoning_evals.comparison import Comparison


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
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A problem that one arm solved more often, with a sample of each arm."""

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
    """A table that the caller made; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


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
    """Of the first pair, largest change first; may be fewer than the comparison counts."""
    lost: Sequence[Example] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """Title -> SVG text, made by the caller."""
    audit: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Arm -> rows of what fired."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further lines for the head, such as model and plan, made by the caller."""

    headline: Sequence[str] = ()
    """Sentences that stand first, before those of the pairs, for a question other than accuracy alone."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Title -> table, made by the caller; they stand before the table of arms."""

    def audit_columns(self) -> list[str]:
        """The fields of the audit rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for rows in self.audit.values() for row in rows for name in row))

    def audit_rows(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(arm, row), arms in the order of the comparison."""
        arms = [arm.name for arm in self.comparison.arms]
        ordered = sorted(self.audit, key=lambda name: (arms.index(name) if name in arms else len(arms), name))
        return [(name, row) for name in ordered for row in self.audit[name]]
