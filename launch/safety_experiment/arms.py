"""The arms of the safety experiment: the model as it is, with a prompt before the question, or with a vector added."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from launch.safety_experiment.options import VECTOR_ARMS, SafetyOptions
from launch.safety_experiment.tasks import SafetyTask
from moe_steer import ResidualVector, SteeringPlan, steer
from reasoning_evals.runs import Arm


class SafetyArm(NamedTuple):
    """One arm, before a task is chosen."""

    name: str
    prefix: str
    """Text before every question; "" for none."""
    plan: SteeringPlan | None

    def on(self, task: SafetyTask, model: Any, tokenizer: Any) -> Arm:
        """This arm on a task."""
        plan = self.plan
        return Arm(
            self.name,
            task.sampler(model, tokenizer),
            context=nullcontext if plan is None else lambda: steer(model, plan, tokenizer=tokenizer, quiet=True),
            details={"prefix": self.prefix, "plan": plan.digest() if plan else None},
            render=task.render(tokenizer, self.prefix),
        )


def safety_arms(options: SafetyOptions, files: Mapping[str, Path]) -> list[SafetyArm]:
    """The arms of the options in their order, vector arms at every strength. ``files``: arm -> its direction.

    As in the paper a vector is added at the output of one layer, at every position, BOS and prompt included.
    """
    arms = []
    for name in options.arms:
        if name not in VECTOR_ARMS:
            arms.append(SafetyArm(name, options.prompt(name), None))
            continue
        for strength in options.strengths:
            shown = name if len(options.strengths) == 1 else f"{name} x{strength:g}"
            vector = ResidualVector(layer=options.layer, file=files[name].name, strength=strength, scope="all")
            arms.append(SafetyArm(shown, "", SteeringPlan(residual=[vector], base_dir=str(files[name].parent))))
    return arms
