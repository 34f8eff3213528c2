"""Experts forced in and out, biased logits and another k, for every decoder family, against the published routing rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import FAMILIES, build_from_config, config_of
from family_cases import Case, busiest, capture_routers, case, collect_routing, logits, traces_left
from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.entries.expert_entry import TopK
from moe_steer.layers import model_shape
from naive_choice import biased, told
from oracles import ORACLES
from test_families import STEERABLE, assert_same_logits

REFUSED = {"dbrx": "the block takes the best", "phimoe": "SparseMixer"}
"""Families whose choice cannot be changed before top-k, and a part of what is said."""
REACHED = [name for name in STEERABLE if name not in REFUSED]
GAIN = 2.0
BIAS = 1.5


def chosen_experts(prepared: Case) -> tuple[int, int, list[int], list[int]]:
    """The last layer, its k, its experts by how often they are chosen, most first, and those not chosen at all behind them."""
    layer = max(prepared.blocks)
    ids_TK = prepared.routing[layer][0][0]
    ranked = busiest(ids_TK)
    return layer, ids_TK.shape[1], ranked, [e for e in range(8) if e not in ranked]


def routed(prepared: Case, plan: SteeringPlan, layer: int) -> tuple[Any, Any, Any]:
    """(ids, weights, what entered the router) at ``layer`` under the plan."""
    with (
        capture_routers(prepared.model, prepared.blocks) as calls,
        steer(prepared.model, plan, strict=True),
        collect_routing(prepared.model) as routing,
    ):
        assert torch.isfinite(logits(prepared.model, prepared.ids_BS)).all()
    assert len(routing[layer]) == 1, "the experts run once a forward"
    return *routing[layer][0], calls[layer]


def test_families_are_reached_or_refused_by_name() -> None:
    assert len(REACHED) >= 65
    for name, words in REFUSED.items():
        prepared = case(name)
        layer = max(prepared.blocks)
        for plan in (
            SteeringPlan(experts=[ExpertGain(layer, 0, force="in")]),
            SteeringPlan(experts=[ExpertGain(layer, 0, logit_bias=1.0)]),
            SteeringPlan(top_k=[TopK(layer, 1)]),
        ):
            for model in (prepared.model, model_shape(prepared.model)):
                with pytest.raises(ValueError, match=words) as error:
                    plan.check(model)
                assert FAMILIES[name].model_type in str(error.value)
                assert "\n" not in str(error.value)


def test_layers_that_look_experts_up_are_refused() -> None:
    prepared = case("deepseek_v4")
    with pytest.raises(ValueError, match="layer 0 of deepseek_v4 cannot be changed: its DeepseekV4HashRouter"):
        SteeringPlan(experts=[ExpertGain(0, 3, force="in")]).check(prepared.model)


@pytest.mark.parametrize("name", REACHED)
@pytest.mark.parametrize("more", [None, 1, -1])
def test_choice_and_weights_equal_the_rules(name: str, more: int | None) -> None:
    """In: every token. Out: none. k stays, or is the asked one. The weights are what the family makes of these scores."""
    prepared = case(name)
    layer, own_k, ranked, _ = chosen_experts(prepared)
    forced, forbidden = ranked[-1], ranked[0]
    k = own_k + (more or 0)
    entries = [ExpertGain(layer, forced, GAIN, force="in"), ExpertGain(layer, forbidden, force="out")]
    plan = SteeringPlan(experts=entries, top_k=[TopK(layer, k)] if more else [])
    ids_TK, weights_TK, call = routed(prepared, plan, layer)
    assert ids_TK.shape[1] == k
    assert bool((ids_TK == forced).any(1).all())
    assert not bool((ids_TK == forbidden).any())
    num_experts = 10 if name == "longcat_flash" else 8
    for t, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        with told(num_experts, forced=[forced], forbidden=[forbidden], k=k):
            wanted = dict(zip(*ORACLES[name](call, t), strict=True))
        wanted[forced] *= GAIN
        found = dict(zip(ids_K, weights_K, strict=True))
        assert len(found) == k
        if name in ("deepseek_v2_groups", "unlimited_ocr"):  # masked groups score 0: which of them fills up is a tie
            wanted, found = ({e: w for e, w in some.items() if w} for some in (wanted, found))
        assert found == pytest.approx(wanted, rel=2e-5, abs=2e-6), f"token {t}"


@pytest.mark.parametrize("name", [name for name in REACHED if name != "gemma4"])  # it norms the input, the 1 with it
def test_a_bias_is_on_the_routers_logit(name: str) -> None:
    prepared = case(name)
    layer, _, ranked, _ = chosen_experts(prepared)
    bias = {ranked[-1]: BIAS, ranked[0]: -BIAS}
    plan = SteeringPlan(experts=[ExpertGain(layer, expert, logit_bias=value) for expert, value in bias.items()])
    ids_TK, weights_TK, call = routed(prepared, plan, layer)
    changed = 0
    for t, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        wanted = dict(zip(*ORACLES[name](biased(call, bias), t), strict=True))
        assert dict(zip(ids_K, weights_K, strict=True)) == pytest.approx(wanted, rel=2e-5, abs=2e-6), f"token {t}"
        changed += set(ids_K) != set(ORACLES[name](call, t)[0])
    assert changed, "a bias that changes no choice proves little"


def test_a_bias_in_gemma4_is_on_the_logit_behind_its_norm() -> None:
    prepared = case("gemma4")
    layer, own_k, ranked, _ = chosen_experts(prepared)
    with torch.no_grad(), steer(prepared.model, SteeringPlan(experts=[ExpertGain(layer, ranked[-1], logit_bias=50.0)])):
        with collect_routing(prepared.model) as routing:
            logits(prepared.model, prepared.ids_BS)
    ids_TK, weights_TK = routing[layer][0]
    assert bool((ids_TK == ranked[-1]).any(1).all())
    assert ids_TK.shape[1] == own_k
    scale = float(prepared.calls[layer].array("router.per_expert_scale")[ranked[-1]])
    torch.testing.assert_close(weights_TK[ids_TK == ranked[-1]], torch.full((len(ids_TK),), scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_groups", "axk2_groups", "glm4_moe", "mistral4"])
def test_as_many_as_k_from_other_groups(name: str) -> None:
    """Three forced experts in three groups, where two groups may be chosen."""
    prepared = case(name)
    layer, own_k, _, _ = chosen_experts(prepared)
    forced = [0, 2, 4][:own_k]  # groups of two
    plan = SteeringPlan(experts=[ExpertGain(layer, expert, force="in") for expert in forced])
    ids_TK, weights_TK, call = routed(prepared, plan, layer)
    assert all(set(forced) <= set(row) for row in ids_TK.tolist())
    assert bool((weights_TK > 0).all()), "an expert outside the chosen groups keeps its own score"
    with told(8, forced=forced):
        wanted = ORACLES[name](call, 0)
    assert dict(zip(ids_TK[0].tolist(), weights_TK[0].tolist(), strict=True)) == pytest.approx(
        dict(zip(*wanted, strict=True)), rel=2e-5
    )


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "llama4", "minimax_m2", "qwen3_moe"])
def test_another_k_equals_a_model_built_with_it(name: str) -> None:
    prepared = case(name)
    own_k = chosen_experts(prepared)[1]
    for k in (own_k - 1, own_k + 1):
        config = config_of(name)
        config.get_text_config().num_experts_per_tok = k
        reference = logits(build_from_config(config, FAMILIES[name].model_class), prepared.ids_BS)
        with steer(prepared.model, SteeringPlan(top_k=[TopK(layer, k) for layer in prepared.blocks]), strict=True):
            assert_same_logits(logits(prepared.model, prepared.ids_BS), reference)
        assert not torch.allclose(reference, prepared.logits_BSV, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", REACHED)
def test_neutral_entries_hook_nothing_and_nothing_stays(name: str) -> None:
    prepared = case(name)
    layer, own_k, ranked, _ = chosen_experts(prepared)
    before = traces_left(prepared.model)
    neutral = SteeringPlan(experts=[ExpertGain(layer, 0, 1.0, logit_bias=0.0)], top_k=[TopK(layer, own_k)])
    with steer(prepared.model, neutral, strict=True):
        assert traces_left(prepared.model) == before
        assert torch.equal(logits(prepared.model, prepared.ids_BS), prepared.logits_BSV)
    plan = SteeringPlan(experts=[ExpertGain(layer, ranked[0], force="out")], top_k=[TopK(layer, own_k - 1)])
    with steer(prepared.model, plan):
        assert traces_left(prepared.model) != before
        assert not torch.equal(logits(prepared.model, prepared.ids_BS), prepared.logits_BSV)
    assert traces_left(prepared.model) == before
    assert torch.equal(logits(prepared.model, prepared.ids_BS), prepared.logits_BSV)
