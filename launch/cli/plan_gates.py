"""``moe-steer plan --when``: a gate on the entries that the command makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.gates.conditions import When
from moe_steer.json_files import parse_json


def with_gate(plan: SteeringPlan, text: str | None, start: str | None, from_out: Callable[[Path], str]) -> SteeringPlan:
    """The plan with the gate of a JSON text on what the plan file ``start`` did not have. ``from_out``: what a file is called from the
    new plan's folder, which is the plan's ``base_dir``. ValueError for a gate that cannot be, and where there is nothing to gate."""
    if text is None:
        return plan
    when = When.of(parse_json(text, "--when", "write it as one JSON object in quotes"))
    when = when.renamed(lambda file: from_out(Path(file)))
    had = SteeringPlan.load(start) if start else SteeringPlan()
    old = {(one.layer, one.expert) for one in had.experts}
    first = len(had.residual)
    if all((one.layer, one.expert) in old for one in plan.experts) and first == len(plan.residual):
        raise ValueError("--when gates the entries made here, and there are none: name experts or --residual")
    experts = [one if (one.layer, one.expert) in old else replace(one, when=when) for one in plan.experts]
    residual = [*plan.residual[:first], *(replace(one, when=when) for one in plan.residual[first:])]
    gated = replace(plan, experts=experts, residual=residual)
    for one in when.conditions:
        if one.file:
            gated.probe(one.file)
    return gated


def gate_words(entry: ExpertGain | ResidualVector) -> str:
    """The gate of an entry, to follow on its line; empty without one."""
    return "" if entry.when is None else f" when {entry.when}"
