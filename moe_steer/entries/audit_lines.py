"""Audit rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_steer.entries.expert_entry import EXPERT_KEYS, ExpertGain


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Audit rows as text: one line per plan entry."""
    lines: list[str] = []
    for row in rows:
        if row["kind"] == "top_k" or "scoped" in row:
            who = f"top {row['k']}" if row["kind"] == "top_k" else f"expert {row['expert']} {_action(row)}"
            lines.append(
                f"layer {row['layer']} {who}: {row['scoped']} tokens in scope, selections {row['selected_before']} before and "
                f"{row['selected_after']} after{_added(row) if row.get('gain', 1.0) != 1.0 else ''}"
            )
        elif row["kind"] == "expert" and "gain" not in row:  # a choice, by a server's count
            lines.append(f"layer {row['layer']} expert {row['expert']} {_action(row)}: at {row['tokens']} tokens")
        elif row["kind"] == "expert":
            lines.append(
                f"layer {row['layer']} expert {row['expert']} x{row['gain']:g}: selected by {row['tokens']} tokens{_added(row)}"
            )
        else:
            unit = " of the residual norm" if row.get("unit") == "residual_norm" else ""
            scope = f" in scope {row['scope']}" if "scope" in row else ""
            lines.append(
                f"layer {row['layer']} vector {row['file']} x{row['strength']:g}{unit}{scope}: added to {row['tokens']} tokens"
            )
    return [line + _openings(row) for line, row in zip(lines, rows, strict=True)]


def _added(row: Mapping[str, Any]) -> str:
    """The weight that a gain added; servers do not count it."""
    return f", weight added {row['weight_added']:.4g}" if "weight_added" in row else ""


def _action(row: Mapping[str, Any]) -> str:
    said = {key: row[key] for key in EXPERT_KEYS if key in row and key != "when"}
    return ExpertGain(**said).action


def _openings(row: Mapping[str, Any]) -> str:
    """What the audit row of a gated entry says of its gate, to follow on its line; empty for other rows."""
    if "openings" not in row:
        return ""
    norm = f", changed by a norm of {row['norm_added']:.4g} in all" if "norm_added" in row else ""
    return (
        f"{norm}; gate {row['when']}: opened {row['openings']} times in {row['opened_rows']} of {row['rows']} rows"
        f" ({row['reopened_rows']} of them more than once)"
    )
