"""Derivatives of outcomes with respect to log gains: against real gains, in float64, across families; memory; refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from expert_stats.causes import Reading, log_gain_gradients, outcomes_under
from expert_stats.causes.forwards import values_of
from families import batch, build
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.inside import recomputed
from moe_steer.layers import decoder_layers, moe_layers

FAMILIES = {
    "deepseek_v3": "sigmoid, bias for the choice, groups, renormalised, scaled; shared expert",
    "qwen3_moe": "softmax, renormalised",
    "qwen2_moe": "softmax, not renormalised; shared expert with its own gate",
    "qwen3_next": "hybrid: linear attention",
    "gpt_oss": "softmax over the chosen, biases, other argument names",
    "llama4": "the weight scales the expert's input",
    "granitemoehybrid": "hybrid: state space; logits scaled",
}


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and routers of the library compute in float32 whatever the weights are: differences would drown in rounding."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def in_float64(name: str) -> Any:
    model = copy.deepcopy(build(name)).to(torch.float64)
    model.set_experts_implementation("eager")  # grouped_mm refuses float64
    return model


def readings() -> list[Reading]:
    """Three sequences of different length over two problems: log p of one, log-odds of one token and of a set."""
    ids = [tuple(row.tolist()) for row in batch(3, 14)]
    cut = (ids[0], ids[1][:12], ids[2][:9])
    at = (tuple(range(3, 13)), (4, 5, 9), (2, 7))
    sets = (tuple((cut[0][place + 1],) for place in at[0]), ((5, 9, 11),) * 3, ((8,),) * 2)
    kinds = ((False, 1.0), (True, 0.5), (True, -2.0))
    return [
        Reading(name=str(n), problem="a" if n < 2 else "b", token_ids=cut[n], at=at[n], tokens=sets[n], odds=odds, weight=weight)
        for n, (odds, weight) in enumerate(kinds)
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_derivatives_are_what_small_real_gains_do(name: str, float64: None) -> None:
    model, step = in_float64(name), 1e-5
    found = log_gain_gradients(model, readings())
    assert found.gradient_PLE.shape == (2, len(moe_layers(model)), moe_layers(model)[0].num_experts)
    scale = np.abs(found.gradient_PLE).max()
    assert scale > 0.1
    busiest = [(at[0], at[1]) for at in np.argwhere(found.selected_LE > 0).tolist()][:6]
    for index, expert in busiest:
        layer = moe_layers(model)[index].index
        plans = [SteeringPlan(experts=[ExpertGain(layer, expert, math.exp(sign * step))]) for sign in (1, -1)]
        up_P, down_P = outcomes_under(model, readings(), plans)
        np.testing.assert_allclose(
            found.gradient_PLE[:, index, expert], (up_P - down_P) / (2 * step), rtol=1e-3, atol=1e-6 * scale
        )
    never = np.argwhere(found.selected_LE == 0)
    assert all(not found.gradient_PLE[:, index, expert].any() for index, expert in never)


def test_a_wrong_derivative_would_be_seen(float64: None) -> None:
    """With the weights' own gradient held back the numbers differ by far more than the tolerance: later routers do follow."""
    model = in_float64("qwen3_moe")
    free, frozen = (log_gain_gradients(model, readings(), router=router).gradient_PLE for router in ("free", "frozen"))
    assert np.abs(free[:, 0] - frozen[:, 0]).max() > 1e-2 * np.abs(free).max()
    np.testing.assert_allclose(
        free[:, -1], frozen[:, -1], rtol=1e-9, atol=1e-12
    )  # no router comes after the last layer


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4"])
def test_frozen_derivatives_are_what_gains_do_when_routing_is_replayed(name: str, float64: None) -> None:
    model, step = in_float64(name), 1e-5
    found = log_gain_gradients(model, readings(), router="frozen")
    index, expert = np.argwhere(found.selected_LE > 3)[0].tolist()
    layer = moe_layers(model)[index].index
    plans = [SteeringPlan(experts=[ExpertGain(layer, expert, math.exp(sign * step))]) for sign in (1, -1)]
    up_P, down_P = outcomes_under(model, readings(), plans, router="frozen")
    np.testing.assert_allclose(found.gradient_PLE[:, index, expert], (up_P - down_P) / (2 * step), rtol=1e-3, atol=1e-6)


def test_a_replay_keeps_choice_and_weights_under_a_large_gain() -> None:
    """A gain of 50 in an early layer moves later choices when routers are free; replayed, ids and weights are the unsteered ones."""
    from expert_stats.causes.log_gains import _recorded, _replayed
    from moe_steer.observe import observe_routing
    from moe_steer.steering import steer

    model = build("deepseek_v3")
    first, last = moe_layers(model)[0], moe_layers(model)[-1]
    rows = readings()
    routing: dict[int, Any] = {}
    with _recorded(model, routing):
        values_of(model, rows)
    ids_TK, weights_TK = routing[last.index]
    plan = SteeringPlan(experts=[ExpertGain(first.index, int(routing[first.index][0][0, 0]), 50.0)])
    for record, kept in ((routing, True), ({}, False)):
        seen: dict[int, Any] = {}
        with _replayed(model, record), steer(model, plan, quiet=True):
            with observe_routing(model, lambda layer, ids, weights, to=seen: to.update({layer: (ids, weights)})):
                values_of(model, rows)
        same = torch.equal(seen[last.index][0], ids_TK) and torch.allclose(seen[last.index][1], weights_TK.float())
        assert same == kept


def test_values_are_those_of_a_plain_forward() -> None:
    model = build("granitemoehybrid")  # scales its logits: the model's own head must be used
    for item, value in zip(readings(), values_of(model, readings()).tolist(), strict=True):
        with torch.no_grad():
            logits_SV = model(torch.tensor([item.token_ids])).logits[0].double()
        wanted = 0.0
        for place, tokens in zip(item.at, item.tokens, strict=True):
            p = torch.softmax(logits_SV[place], -1)[list(tokens)].sum()
            wanted += item.weight * float(torch.log(p / (1 - p)) if item.odds else torch.log(p))
        assert value == pytest.approx(wanted, rel=1e-4)


def test_nothing_depends_on_the_batches_or_on_what_shares_a_pass_through_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("deepseek_v3")
    whole = log_gain_gradients(model, readings())
    monkeypatch.setattr("expert_stats.causes.forwards.HEAD_TOKENS", 3)
    single = log_gain_gradients(model, readings(), tokens_per_batch=1)
    np.testing.assert_allclose(single.gradient_PLE, whole.gradient_PLE, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(single.selected_LE, whole.selected_LE)
    parts = [log_gain_gradients(model, readings(), tokens_per_batch=1, share=(rank, 2)) for rank in (0, 1)]
    np.testing.assert_allclose(sum(part.gradient_PLE for part in parts), single.gradient_PLE, rtol=1e-9)


def test_layers_keep_their_inputs_alone() -> None:
    """Tensors that the backward pass keeps: far fewer with recomputation, and the same gradient."""
    model = build("qwen3_moe")
    _, layers = decoder_layers(model)
    kept: dict[bool, int] = {}
    for again in (True, False):
        sizes: list[int] = []
        embeds = model.get_input_embeddings()(batch(2, 12)).requires_grad_()
        pack = lambda tensor, to=sizes: to.append(tensor.numel()) or tensor  # noqa: E731
        with recomputed(layers if again else []), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(inputs_embeds=embeds, use_cache=False)
        kept[again] = sum(sizes)
    assert kept[True] < kept[False] / 4
    assert "forward" not in vars(layers[0])


def test_weights_get_no_gradient_and_the_model_stays_as_it_was() -> None:
    model = build("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log_gain_gradients(model, readings())
    assert all(value.grad is None and not value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_experts_or_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose one of free, frozen"):
        log_gain_gradients(build("qwen3_moe"), readings(), router="held")
    with pytest.raises(ValueError, match="nothing to read"):
        log_gain_gradients(build("qwen3_moe"), [])
    model = copy.deepcopy(build("qwen3_moe"))
    for number, said in ((1, "layer 1 keep no gradient"), (2, "no gradient reaches the output")):
        for layer in moe_layers(model)[:number]:
            forward = layer.experts.forward
            monkeypatch.setattr(layer.experts, "forward", lambda *args, of=forward, **more: of(*args, **more).detach())
        with pytest.raises(ValueError, match=said):
            log_gain_gradients(model, readings())
