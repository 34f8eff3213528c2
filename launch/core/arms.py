"""What an arm does to a loaded model: a plan from its file, and the context in which it steers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_steer import SteeringPlan, steer

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape
    from reasoning_evals.runs import Arm


def load_plan(path: str) -> SteeringPlan:
    """The plan of a file; ValueError as ``SteeringPlan.load``, and for a neutral plan."""
    plan = SteeringPlan.load(path)
    if plan.is_neutral:
        raise ValueError(f"the plan {path!r} is neutral (all gains 1, all strengths 0): there is nothing to compare")
    return plan


def check_fits(plan: SteeringPlan, shape: ModelShape | None, source: str) -> None:
    """ValueError, which begins with where the plan is from, for one that does not fit the model (None: not known yet)."""
    if shape is None:
        return
    try:
        plan.check(shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def steering(model: Any, tokenizer: Any, plan: SteeringPlan) -> Callable[[], Any]:
    """The context in which the model is steered; the run keeps its audit."""
    return lambda: steer(model, plan, tokenizer=tokenizer, quiet=True)


def arm_here(name: str, model: Any, tokenizer: Any, plan: SteeringPlan | None) -> Arm:
    """A loaded model under a plan, or as it is; ValueError for a plan that does not fit."""
    from reasoning_evals.engines import InProcessSampler
    from reasoning_evals.runs import Arm

    sampler = InProcessSampler(model, tokenizer)
    if plan is None:
        return Arm(name, sampler, details={"plan": None})
    plan.check(model)
    return Arm(name, sampler, context=steering(model, tokenizer, plan), details={"plan": plan.digest()})
