"""Observation and steering against independent arithmetic, for every decoder family with routed experts."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from families import FAMILIES, NOT_IN_TABLE, REFUSED, available
from family_cases import case, collect_routing, logits, padded, traces_left
from moe_steer import ExpertGain, SteeringPlan, observe_routing, steer
from moe_steer.hooks import output_hooks
from moe_steer.layers import model_shape, moe_layers
from moe_steer.observe import observe_expert_norms
from naive_experts import Gains, naive_steering
from oracles import ORACLES, UNORDERED
from routing_rules import biased_scores

STEERABLE = [name for name in available() if name not in REFUSED]
every_family = pytest.mark.parametrize("name", STEERABLE)

# Largest difference allowed, as a part of the largest logit; measured: 2e-6 in float32.
TOLERANCE = 2e-5


def assert_same_logits(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def by_expert(ids_K: list[int], weights_K: list[float]) -> dict[int, float]:
    assert len(set(ids_K)) == len(ids_K), f"an expert twice in {ids_K}"
    return dict(zip(ids_K, weights_K, strict=True))


@pytest.mark.skipif(transformers.__version__ >= "5.25", reason="the table was made for transformers up to 5.24")
def test_every_folder_with_experts_is_in_the_table() -> None:
    folders = {
        path.parent.name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if re.search(r"^\s*self\.experts\s*=", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    known = {family.folder for family in FAMILIES.values()} | set(NOT_IN_TABLE) | {"inkling2_loop"}
    assert folders <= known, f"families without a tiny model: {sorted(folders - known)}"
    assert len({FAMILIES[name].model_type for name in STEERABLE}) >= 60


@every_family
def test_layers_are_found(name: str) -> None:
    prepared = case(name)
    found = moe_layers(prepared.model)
    assert tuple(layer.index for layer in found) == FAMILIES[name].moe_layers
    assert model_shape(prepared.model).moe_layers == FAMILIES[name].moe_layers
    for layer in found:
        assert layer.block is prepared.blocks[layer.index]
        assert layer.experts is prepared.blocks[layer.index].experts
        ids_TK = prepared.routing[layer.index][0][0]
        assert layer.top_k == ids_TK.shape[1]
        assert layer.num_experts == (10 if name == "longcat_flash" else 8)  # 8 and two identity experts
        assert int(ids_TK.max()) < layer.num_experts


@every_family
def test_observed_routing_equals_the_oracle(name: str) -> None:
    prepared = case(name)
    assert list(prepared.routing) == list(FAMILIES[name].moe_layers)
    for layer, call in prepared.calls.items():
        assert len(prepared.routing[layer]) == 1, "the sink is called once a layer and forward"
        ids_TK, weights_TK = prepared.routing[layer][0]
        assert ids_TK.dtype == torch.int64
        assert weights_TK.dtype == torch.float32
        assert ids_TK.shape == weights_TK.shape == (prepared.ids_BS.numel(), ids_TK.shape[1])
        for t, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
            expected_K, expected_weights_K = ORACLES[name](call, t)
            expected = by_expert(expected_K, expected_weights_K)
            assert by_expert(ids_K, weights_K) == pytest.approx(expected, rel=1e-5, abs=1e-6), (
                f"layer {layer} token {t}"
            )
            if name not in UNORDERED:
                assert ids_K == expected_K
        assert len(ids_TK.unique()) >= 5, "routing that does not vary proves little"


@pytest.mark.parametrize("name", [n for n in STEERABLE if getattr(ORACLES[n], "func", None) is biased_scores])
def test_bias_and_groups_decide_in_the_tiny_models(name: str) -> None:
    """Were the bias or the groups without effect, the oracle test could not see them forgotten."""

    def choices(**changed: Any) -> list[set[int]]:
        oracle = functools.partial(ORACLES[name], **changed)
        return [set(oracle(call, t)[0]) for call in prepared.calls.values() for t in range(len(call.hidden_TD))]

    prepared = case(name)
    options: dict[str, Any] = ORACLES[name].keywords  # type: ignore[attr-defined]
    if options.get("bias", "router") is not None:
        assert choices(bias=None) != choices()
    if options.get("groups") and prepared.model.config.get_text_config().n_group > 1:
        assert choices(groups=False) != choices()


@every_family
@pytest.mark.parametrize("renormalize", [False, True])
def test_steered_logits_and_audit_equal_the_naive_experts(name: str, renormalize: bool) -> None:
    prepared = case(name)
    model, gains = prepared.model, prepared.gains
    with naive_steering(model, name, prepared.blocks, gains, renormalize) as expected:
        reference = logits(model, prepared.ids_BS)
    with steer(model, prepared.plan(renormalize=renormalize)) as audit:
        steered = logits(model, prepared.ids_BS)
    assert_same_logits(steered, reference)
    moved = (steered - prepared.logits_BSV).abs().max() / prepared.logits_BSV.abs().max()
    assert moved > 0.05, "steering that moves nothing proves nothing"
    assert set(audit.fired) == set(gains)
    for key in gains:
        assert audit.fired[key].tokens == expected.tokens.get(key, 0)
        assert audit.fired[key].weight_added == pytest.approx(expected.weight_added.get(key, 0.0), rel=1e-4, abs=1e-5)
    assert sum(fired.tokens > 0 for fired in audit.fired.values()) >= 2


def test_the_naive_experts_can_disagree() -> None:
    prepared = case("deepseek_v3")
    other: Gains = {key: gain * 1.01 for key, gain in prepared.gains.items()}
    with naive_steering(prepared.model, prepared.name, prepared.blocks, other):
        reference = logits(prepared.model, prepared.ids_BS)
    with steer(prepared.model, prepared.plan()):
        steered = logits(prepared.model, prepared.ids_BS)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(steered, reference)


@every_family
def test_neutral_and_empty_plans_change_no_bit(name: str) -> None:
    prepared = case(name)
    ones = [ExpertGain(layer, expert, 1.0) for layer, expert in prepared.gains]
    for plan in (SteeringPlan(), SteeringPlan(experts=ones), SteeringPlan(experts=ones, renormalize=True)):
        with steer(prepared.model, plan):
            assert torch.equal(logits(prepared.model, prepared.ids_BS), prepared.logits_BSV)


@every_family
def test_nothing_is_left_behind(name: str) -> None:
    prepared = case(name)
    model, plan = prepared.model, prepared.plan()
    before = traces_left(model)
    with steer(model, plan, quiet=True), collect_routing(model):
        assert traces_left(model) != before, "nothing is hooked, so this test could not fail"
    assert traces_left(model) == before
    with pytest.raises(KeyError, match="inside"), steer(model, plan), collect_routing(model):
        raise KeyError("inside")
    assert traces_left(model) == before

    def sink(layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        raise KeyError("in the middle of a forward")

    with pytest.raises(KeyError, match="middle"), steer(model, plan), observe_routing(model, sink):
        logits(model, prepared.ids_BS)
    assert traces_left(model) == before
    assert torch.equal(logits(model, prepared.ids_BS), prepared.logits_BSV)


@every_family
def test_observing_and_steering_nest(name: str) -> None:
    """What is observed inside ``steer`` are the weights that the experts get; ids of the first layer do not change."""
    prepared = case(name)
    first = min(prepared.blocks)
    with steer(prepared.model, prepared.plan()), collect_routing(prepared.model) as inside:
        steered = logits(prepared.model, prepared.ids_BS)
    with collect_routing(prepared.model), steer(prepared.model, prepared.plan()):
        assert torch.equal(logits(prepared.model, prepared.ids_BS), steered)
    ids_TK, weights_TK = prepared.routing[first][0]
    gain_TK = torch.tensor([[prepared.gains.get((first, e), 1.0) for e in row] for row in ids_TK.tolist()])
    assert torch.equal(inside[first][0][0], ids_TK)
    torch.testing.assert_close(inside[first][0][1], weights_TK * gain_TK)


@every_family
def test_prefill_and_decode_equal_one_forward(name: str) -> None:
    prepared = case(name)
    model, ids_BS, cut = prepared.model, prepared.ids_BS, 8
    with steer(model, prepared.plan()) as whole_audit:
        whole = logits(model, ids_BS)
    parts, cache = [], None
    with steer(model, prepared.plan()) as audit, collect_routing(model) as routing, torch.no_grad():
        for start, end in [(0, cut), *((i, i + 1) for i in range(cut, ids_BS.shape[1]))]:
            output = model(
                input_ids=ids_BS[:, start:end],
                attention_mask=torch.ones(len(ids_BS), end, dtype=torch.long),
                position_ids=torch.arange(start, end).expand(len(ids_BS), -1),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    assert cache is not None
    assert_same_logits(torch.cat(parts, dim=1), whole, 1e-4)
    steps = 1 + ids_BS.shape[1] - cut
    assert {layer: len(seen) for layer, seen in routing.items()} == dict.fromkeys(prepared.blocks, steps)
    for key, fired in whole_audit.fired.items():
        assert audit.fired[key].tokens == fired.tokens
        assert audit.fired[key].weight_added == pytest.approx(fired.weight_added, rel=1e-3, abs=1e-4)


@every_family
def test_greedy_generation_equals_full_forwards(name: str) -> None:
    prepared = case(name)
    prompt_BS, num_new = prepared.ids_BS[:, :6], 4
    expected_BS = prompt_BS
    with steer(prepared.model, prepared.plan(), quiet=True):
        for _ in range(num_new):
            next_B = logits(prepared.model, expected_BS)[:, -1].argmax(-1)
            expected_BS = torch.cat([expected_BS, next_B[:, None]], dim=1)
        generated_BS = prepared.model.generate(
            input_ids=prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=num_new,
            do_sample=False,
            eos_token_id=None,
        )
    assert generated_BS.tolist() == expected_BS.tolist()


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "gpt_oss", "gemma4", "nemotron_h"])
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_backend_is_steered_alike(name: str, backend: str) -> None:
    prepared = case(name)
    model = prepared.model
    with steer(model, prepared.plan()):
        expected = logits(model, prepared.ids_BS)
    before = model.config._experts_implementation
    model.set_experts_implementation(backend)
    try:
        with steer(model, prepared.plan()):
            steered = logits(model, prepared.ids_BS)
    finally:
        model.set_experts_implementation(before)
    assert_same_logits(steered, expected)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_routing_nor_logits_nor_audit(name: str, side: str) -> None:
    prepared = case(name)
    model = prepared.model
    rows = [prepared.ids_BS[0], prepared.ids_BS[1, :7]]
    alone, alone_routing, tokens = [], [], dict.fromkeys(prepared.gains, 0)
    for row in rows:
        with steer(model, prepared.plan(), quiet=True) as audit, collect_routing(model) as routing:
            alone.append(logits(model, row[None]))
        alone_routing.append(routing)
        tokens = {key: tokens[key] + audit.fired[key].tokens for key in tokens}
    inputs = padded(rows, side)
    with steer(model, prepared.plan()) as audit, collect_routing(model) as routing:
        together = logits(model, inputs.pop("input_ids"), **inputs)
    real_BS = inputs["attention_mask"].bool()
    assert {key: fired.tokens for key, fired in audit.fired.items()} == tokens
    for b in range(len(rows)):
        assert_same_logits(together[b, real_BS[b]], alone[b][0], 1e-4)
        for layer in prepared.blocks:
            ids_TK, weights_TK = (x.reshape(*real_BS.shape, -1)[b, real_BS[b]] for x in routing[layer][0])
            expected_ids_TK, expected_weights_TK = alone_routing[b][layer][0]
            assert torch.equal(ids_TK.sort().values, expected_ids_TK.sort().values)
            order, expected_order = ids_TK.argsort(), expected_ids_TK.argsort()
            torch.testing.assert_close(
                weights_TK.gather(1, order), expected_weights_TK.gather(1, expected_order), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    "name", [name for name in STEERABLE if name != "llama4"]
)  # there weights act inside the experts
def test_the_norm_of_an_expert_is_the_length_of_what_its_gain_adds(name: str) -> None:
    prepared = case(name)
    layer = moe_layers(prepared.model)[-1]
    ids_TK = prepared.routing[layer.index][0][0]
    expert = int(ids_TK[0, 0])
    norms: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: list[Tensor] = []
    with observe_expert_norms(prepared.model, lambda index, *seen: norms.update({index: seen})):
        logits(prepared.model, prepared.ids_BS)
    for gain in (1.0, 2.0):
        with (
            steer(prepared.model, SteeringPlan(experts=[ExpertGain(layer.index, expert, gain)])),
            output_hooks({layer.experts: lambda output: outputs.append(output.reshape(len(ids_TK), -1).clone())}),
        ):
            logits(prepared.model, prepared.ids_BS)
    found_TK, norms_TK = norms[layer.index]
    assert torch.equal(found_TK, ids_TK)
    added_T = torch.where(ids_TK == expert, norms_TK, 0).sum(1)
    torch.testing.assert_close((outputs[1] - outputs[0]).norm(dim=-1), added_T, rtol=1e-3, atol=1e-4)
