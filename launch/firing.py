"""What fired in a whole run, from the audit rows that the run kept chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_steer.plan import SteeringPlan
from reasoning_evals.runs import read_audit, read_generations


def nothing_fired(plan: SteeringPlan, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the run does not deserve the name steered, or None. A neutral plan is not meant to fire."""
    if plan.is_neutral or any(row["tokens"] for row in rows):
        return None
    scopes = ({plan.scope} if plan.active_experts else set()) | {entry.scope for entry in plan.active_residual}
    return (
        f"nothing of the plan fired in the whole run: none of its {len(plan.active_experts)} experts and "
        f"{len(plan.active_residual)} vectors met a token in scope {', '.join(sorted(scopes))}; the arm equals the baseline"
    )


def silent_arms(plans: Mapping[str, SteeringPlan | None], reference: str, folder: Path) -> list[str]:
    """One sentence for every arm of a run folder that did nothing: its plan never fired, or every sample equals the
    reference's. ``plans``: arm -> its plan, None for prompts and decoding rules."""
    firing = read_audit(folder)
    samples: dict[str, dict[tuple[str, int], int]] = {name: {} for name in plans}
    for item in read_generations(folder):
        samples[item.arm][item.problem_id, item.sample_idx] = hash((item.prompt, item.token_ids))
    found = []
    for name, plan in plans.items():
        if plan and (problem := nothing_fired(plan, firing.get(name, []))):
            found.append(f"{name}: {problem}")
        elif name != reference and samples[name] == samples[reference]:
            found.append(f"{name}: every sample equals the one of {reference}, token by token; the arm changed nothing")
    return found
