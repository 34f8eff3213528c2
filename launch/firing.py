"""What fired in a whole run, from the audit rows that the run kept chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_steer.plan import SteeringPlan


def nothing_fired(plan: SteeringPlan, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the run does not deserve the name steered, or None. A neutral plan is not meant to fire."""
    if plan.is_neutral or any(row["tokens"] for row in rows):
        return None
    scopes = ({plan.scope} if plan.active_experts else set()) | {entry.scope for entry in plan.active_residual}
    return (
        f"nothing of the plan fired in the whole run: none of its {len(plan.active_experts)} experts and "
        f"{len(plan.active_residual)} vectors met a token in scope {', '.join(sorted(scopes))}; the arm equals the baseline"
    )
