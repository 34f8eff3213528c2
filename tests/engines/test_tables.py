"""Routers and layers under tables, each token under a plan of its own, against the plain kernel told by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_routers import ROUTERS, CustomRoutingRouter, FakeRouter, FakeRunner, LyingRouter, by_hand
from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer_vllm.choosing import rule_of
from moe_steer_vllm.tables import TokenRows, steer_layer, steer_router

LAYER, TOKENS = 3, 40
LOGITS_TE = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(1))
PLANS = [
    SteeringPlan(experts=[ExpertGain(LAYER, 0, 4.0), ExpertGain(LAYER, 5, 0.0), ExpertGain(1, 2, 9.0)]),
    SteeringPlan(experts=[ExpertGain(LAYER, 2, 3.0), ExpertGain(LAYER, 1, 0.5)], renormalize=True),
    SteeringPlan(experts=[ExpertGain(LAYER, 6, 2.0, logit_bias=1.5)]),
]
FORCING = SteeringPlan(
    experts=[
        ExpertGain(LAYER, 7, 5.0, force="in"),
        ExpertGain(LAYER, 0, force="out"),
        ExpertGain(LAYER, 3, logit_bias=-2.0),
    ]
)


def steered(
    router: FakeRouter, plans: list[SteeringPlan], dose: float = 1.0, replicas: int = 0
) -> tuple[Tensor, Tensor, TokenRows]:
    """The weights and ids [T, K] of tokens under no plan, plan 1, 2 ... in turn."""
    tokens = TokenRows.of(plans, TOKENS + 3, slots=2, device="cpu")
    tokens.rows_CN[0, :TOKENS] = torch.arange(TOKENS) % (len(plans) + 1)
    tokens.base_N[:TOKENS] = tokens.width
    tokens.dose_N[:TOKENS] = dose
    runner = FakeRunner(router, replicas)
    steer_router(runner, router, LAYER, plans, tokens, lambda: rule_of(router, 8, 4, "cpu"))
    return *router._compute_routing(torch.zeros(TOKENS, 4), LOGITS_TE, None), tokens


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("forcing", [False, True])
@pytest.mark.parametrize("replicas", [0, 4])
def test_every_token_is_routed_as_its_own_plan_says(kind: str, forcing: bool, replicas: int) -> None:
    """Also where the router counts the replicas of a load balancer as experts."""
    router, plain = ROUTERS[kind](), ROUTERS[kind]()
    plans = [*PLANS, FORCING] if forcing else PLANS
    weights_TK, ids_TK, tokens = steered(router, plans, replicas=replicas)
    hits = dict.fromkeys(range(1, tokens.width), 0)
    for t in range(TOKENS):
        row = t % (len(plans) + 1)
        plan = plans[row - 1] if row else None
        expected = by_hand(plain, plan, LAYER, LOGITS_TE[t].double().numpy().copy())
        found = dict(zip(ids_TK[t].tolist(), weights_TK[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), (kind, t)
        column = 1 + sum(len(other.active_experts) for other in plans[: row - 1]) if row else 0
        biased = LOGITS_TE[t].double().numpy().copy()
        for entry in plan.active_experts if plan else ():
            if entry.layer == LAYER:
                biased[entry.expert] += entry.logit_bias
        itself = plain.one(biased)[0]
        for number, entry in enumerate(plan.active_experts if plan else (), column):
            acted = bool(entry.logit_bias) or entry.expert in (itself if entry.force == "out" else expected)
            hits[number] += entry.layer == LAYER and acted
    assert tokens.counts()[1].tolist()[1:] == list(hits.values())
    assert sum(hits.values()) > 5
    assert not tokens.counts()[0].any()


def test_the_rows_of_tokens_that_are_not_steered_are_the_kernel_s_own_to_the_last_bit() -> None:
    router, plain = ROUTERS["groups and bias"](), ROUTERS["groups and bias"]()
    weights_TK, ids_TK, _ = steered(router, [*PLANS, FORCING])
    own = plain._compute_routing(torch.zeros(TOKENS, 4), LOGITS_TE, None)
    assert torch.equal(weights_TK[::5], own[0][::5])
    assert torch.equal(ids_TK[::5], own[1][::5])


@pytest.mark.parametrize("dose", [0.0, 0.5, 1.0, 3.0])
def test_a_dose_is_the_plan_s_own(dose: float) -> None:
    asked, whole = ROUTERS["softmax"](), ROUTERS["softmax"]()
    plans = [PLANS[1], PLANS[2]] if dose == 3.0 else PLANS  # a gain of 0 has no threefold dose
    plans = [plan for plan in plans if dose <= 1 or plan is PLANS[2]]
    for one, other in zip(
        steered(asked, plans, dose)[:2], steered(whole, [p.dosed(dose) for p in plans])[:2], strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("router", "name"), [(CustomRoutingRouter(), "CustomRoutingRouter"), (LyingRouter(), "FusedTopKRouter")]
)
def test_a_choice_that_is_not_known_is_refused_by_name_and_gains_are_not(router: FakeRouter, name: str) -> None:
    steered(type(router)(), PLANS)
    with pytest.raises(
        ValueError, match=f"the choice of experts of {name} cannot be reached, so experts cannot be forced"
    ):
        steered(router, [FORCING])


def test_weights_of_fused_shared_experts_are_not_rescaled() -> None:
    router = ROUTERS["groups"]()
    router.num_fused_shared_experts = 1
    steered(router, PLANS[:1])
    with pytest.raises(ValueError, match="layer 3 hold those of its fused shared experts, .*: leave renormalize out"):
        steered(router, PLANS)


def test_padding_of_the_engine_counts_for_nobody() -> None:
    router = ROUTERS["softmax"]()
    tokens = TokenRows.of(PLANS, TOKENS, slots=2, device="cpu")
    compute = router._compute_routing
    router._compute_routing = lambda *a, **k: (compute(*a, **k)[0], torch.full((TOKENS, 2), -1, dtype=torch.int32))  # type: ignore[method-assign]
    steer_router(FakeRunner(router), router, LAYER, PLANS, tokens, lambda: rule_of(router, 8, 4, "cpu"))
    router._compute_routing(torch.zeros(TOKENS, 4), LOGITS_TE, None)
    assert not tokens.counts()[:, 1:].any()


@pytest.mark.parametrize("eager", [False, True])
def test_nothing_is_read_where_nothing_is_steered_and_no_graph_is_replayed(eager: bool) -> None:
    """Tables of NaN say who reads them; a recorded forward has to, as its next batch may be steered."""
    plans = [SteeringPlan(experts=PLANS[0].experts, residual=[ResidualVector(LAYER, vector=torch.ones(4))])]
    router, layer = ROUTERS["softmax"](), Layer("stream")
    tokens = TokenRows.of(plans, TOKENS, slots=2, device="cpu", eager=eager)
    runner, plain = FakeRunner(router), router._compute_routing(torch.zeros(TOKENS, 4), LOGITS_TE, None)
    steer_router(runner, router, LAYER, plans, tokens, lambda: rule_of(router, 8, 4, "cpu"))
    steer_layer(layer, LAYER, plans, tokens)
    runner.steer_gain.fill_(torch.nan)
    layer.steer_shift_0.fill_(torch.nan)
    for written in (0, TOKENS, 0):
        tokens.written = written
        weights_TK = router._compute_routing(torch.zeros(TOKENS, 4), LOGITS_TE, None)[0]
        hidden_TD = layer(torch.zeros(TOKENS, 4))
        read = written > 0 or not eager
        assert bool(weights_TK.isnan().all()) == bool(hidden_TD.isnan().all()) == read
        assert read or torch.equal(weights_TK, plain[0])


class Layer(nn.Module):
    """A decoder layer in one of the shapes that vLLM's have."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, hidden_TD: Tensor) -> Any:
        if self.shape == "streams":
            return hidden_TD[:, None].expand(-1, 4, -1)
        return hidden_TD if self.shape == "stream" else (hidden_TD, 2 * hidden_TD)


@pytest.mark.parametrize("shape", ["stream", "added and stream"])
def test_vectors_are_added_in_their_scopes_and_doses(shape: str) -> None:
    one, two = torch.randn(4, generator=torch.Generator().manual_seed(2)), torch.ones(4)
    plans = [
        SteeringPlan(residual=[ResidualVector(LAYER, vector=one), ResidualVector(1, vector=two)]),
        SteeringPlan(
            experts=[ExpertGain(LAYER, 0, 2.0)],
            residual=[
                ResidualVector(LAYER, vector=one, strength=2.0, scope="thought"),
                ResidualVector(LAYER, vector=two, scope="thought"),
                ResidualVector(LAYER, vector=two, strength=-3.0),
            ],
        ),
    ]
    tokens = TokenRows.of(plans, 6, slots=3, device="cpu")
    # Scope all is the first of both plans, thought the second plan's second: tokens 2 and 3 are in it.
    tokens.rows_CN[0, :5], tokens.rows_CN[1, :5] = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 0, 2, 0, 0])
    tokens.dose_N[:5] = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0])
    tokens.base_N[:5] = torch.tensor([0, 1, 2, 2, 0]) * tokens.width
    layer = Layer(shape)
    steer_layer(layer, LAYER, plans, tokens)
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    output = layer(start)
    first = output if shape == "stream" else output[0]
    expected = start.clone()
    expected[1] += one
    expected[2] += 0.5 * (2 * one + two - 3 * two)
    expected[3] += -3 * two
    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.equal(first[[0, 4]], start[[0, 4]])
    assert shape == "stream" or torch.equal(output[1], 2 * start)
    assert tokens.counts()[1:, 1:].tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize("eager", [False, True])
def test_a_layer_of_another_shape_is_refused_when_it_first_runs(eager: bool) -> None:
    layer = Layer("streams")
    plans = [SteeringPlan(residual=[ResidualVector(LAYER, vector=torch.ones(4))])]
    steer_layer(layer, LAYER, plans, TokenRows.of(plans, 6, slots=2, device="cpu", eager=eager))
    with pytest.raises(RuntimeError, match="Layer does not return the residual stream as"):
        layer(torch.zeros(2, 4))
