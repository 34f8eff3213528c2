"""A dose of a plan: so many times what the plan adds, to weights, logits and the residual stream alike."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, steer
from moe_steer.entries.expert_entry import TopK

PLAN = SteeringPlan(
    experts=[ExpertGain(1, 2, 64.0), ExpertGain(2, 3, 0.5, logit_bias=2.0)],
    residual=[ResidualVector(1, vector=torch.ones(64), strength=3.0)],
)


def test_half_a_dose_adds_half_to_every_weight_and_vector() -> None:
    model = tiny.deepseek_v3()
    plan = SteeringPlan(experts=[ExpertGain(1, e, 3.0) for e in range(16)])
    added = []
    for dose in (1.0, 0.5):
        with steer(model, plan.dosed(dose)) as audit, torch.no_grad():
            model(torch.arange(1, 9)[None])
        added.append(sum(fired.weight_added for fired in audit.fired.values()))
    assert added[1] == pytest.approx(added[0] / 2, rel=1e-5)
    assert PLAN.dosed(0.5).residual[0].strength == 1.5
    assert PLAN.dosed(0.5).experts[1].logit_bias == 1.0


def test_dose_1_is_the_plan_and_dose_0_nothing() -> None:
    assert PLAN.dosed(1).digest() == PLAN.digest()
    assert PLAN.dosed(0).is_neutral


@pytest.mark.parametrize(
    ("plan", "dose", "message"),
    [
        (PLAN, 1e308, "dose 1e+308 is out of range: give a number from -100 to 100"),
        (PLAN, math.nan, "dose nan is out of range"),
        (PLAN, True, "dose True is out of range"),
        (PLAN, -1, "dose -1 makes the gain 64 of layer 1 expert 2 -62: a gain is never below 0"),
        (SteeringPlan(experts=[ExpertGain(1, 2, force="in")]), 0.5, "layer 1 expert 2 is forced in, and that has no dose"),
        (SteeringPlan(top_k=[TopK(1, 3)]), 2, "a number of experts has no dose"),
    ],
)  # fmt: skip
def test_what_has_no_dose_is_refused(plan: SteeringPlan, dose: float, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        plan.dosed(dose)
