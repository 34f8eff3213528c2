"""The summary of thoughts as one table for a terminal."""

from __future__ import annotations

import math

from reasoning_evals.report.text import count, minus, percent, signed_count, signed_points
from reasoning_evals.thinking_measures import MEASURES
from reasoning_evals.thinking_summary import ArmThinking, ThinkingChange, ThinkingSummary, ThinkingValue

COLUMNS = {
    "accuracy": "correct",
    "thinking_tokens": "thinking",
    "closed": "closed",
    "attempts": "attempts",
    "stated": "stated",
    "chance": "chance",
    "first_right_at": "first at",
    "outcome_efficiency": "outcome",
    "process_efficiency": "process",
    "underthinking": "under",
}
_KINDS = {measure.name: measure.kind for measure in MEASURES}
LEGEND = (
    "stated: thoughts that state the right answer; chance: that of another problem; first at: tokens up to the first right one",
    "outcome, process: efficiency (arXiv 2412.21187); under: underthinking of wrong responses (2501.18585); all by rule",
)


def thinking_lines(summary: ThinkingSummary) -> list[str]:
    """Two lines an arm: its means, and below them the 95% interval (baseline) or the change with its interval (other arms)."""
    k = summary.num_samples
    over = f", in {summary.num_clusters} clusters" if summary.num_clusters else ""
    title = f"{summary.num_problems} problems x {k} {'sample' if k == 1 else 'samples'}{over}; 95% intervals over "
    title += "clusters" if over else "problems"
    if len(summary.arms) > 1:
        title += f"; changes against {summary.baseline}, paired"
    rows = [["", *COLUMNS.values()]]
    for arm in summary.arms:
        rows.append([arm.name, *(_mean(name, arm.values[name]) for name in COLUMNS)])
        rows.append(_below(arm, arm.name == summary.baseline))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return [title, *(line.rstrip() for line in lines), *LEGEND]


def _below(arm: ArmThinking, is_baseline: bool) -> list[str]:
    if is_baseline:
        return ["  95%", *(_interval(name, arm.values[name]) for name in COLUMNS)]
    return ["  change", *(_change(name, arm.changes[name]) for name in COLUMNS)]


def _mean(name: str, value: ThinkingValue | None) -> str:
    return "–" if value is None else _number(name, value.mean)


def _interval(name: str, value: ThinkingValue | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "–"
    return f"{_number(name, value.low).rstrip('%')} to {_number(name, value.high).rstrip('%')}"


def _change(name: str, change: ThinkingChange | None) -> str:
    """With half the width of its interval, or both ends where they are not as far; no interval where all moved alike."""
    if change is None:
        return "–"
    mean = _signed(name, change.mean)
    if change.low is None or change.high is None:
        return mean
    if not math.isclose(change.high - change.mean, change.mean - change.low, rel_tol=1e-6):
        return f"{mean} ({_signed(name, change.low)} to {_signed(name, change.high)})"
    half = (change.high - change.low) / 2
    return f"{mean} ±{_number(name, half).rstrip('%')}"


def _signed(name: str, value: float) -> str:
    if _KINDS[name] == "share":
        return signed_points(value)
    return signed_count(value) if _KINDS[name] == "tokens" else minus(f"{value:+.2f}")


def _number(name: str, value: float) -> str:
    if _KINDS[name] == "share":
        return percent(value)
    return count(value) if _KINDS[name] == "tokens" else f"{value:.2f}"
