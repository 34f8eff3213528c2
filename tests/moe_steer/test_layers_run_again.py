"""Layers that run more than once: for the backward pass, where nothing counts twice, and in every forward of models with a loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import tiny
from expert_stats import Trace, collect_counts
from families import batch, build_from_config
from family_cases import busiest, collect_routing, logits
from family_configs import BASE
from family_configs_later import LOOPED
from moe_steer import ExpertGain, SteeringPlan, TopK, bake, observe_residual, observe_routing, steer
from moe_steer.layers import moe_layers
from moe_steer.tokens.markers import Marker, MarkerSet

with_a_loop = pytest.mark.skipif("inkling2_loop_text" not in CONFIG_MAPPING, reason="came with transformers 5.24")


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_the_backward_pass_runs_again_is_counted_once(reentrant: bool) -> None:
    model: Any = copy.deepcopy(tiny.qwen3_moe()).train().requires_grad_(True)
    ids_BS = torch.tensor([[5, 6, 7, 10, 40, 8], [9, 30, 7, 11, 5, 6]])
    plan = SteeringPlan(
        experts=[ExpertGain(1, expert, 4.0) for expert in range(3)] + [ExpertGain(1, 3, force="in")],
        top_k=[TopK(2, 1)],
    )

    def counted() -> tuple[list[dict[str, Any]], list[int]]:
        layers: list[int] = []
        with steer(model, plan) as audit, observe_routing(model, lambda layer, *_: layers.append(layer)):
            embeds_BSD = model.get_input_embeddings()(ids_BS).detach().requires_grad_(True)
            model(inputs_embeds=embeds_BSD, labels=ids_BS, use_cache=False).loss.backward()
        return audit.to_rows(), layers

    once = counted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert counted() == once


@with_a_loop
def test_a_looped_layer_is_steered_each_time_as_its_baked_weights_are(tmp_path: Path) -> None:
    model, ids_BS = build_from_config(CONFIG_MAPPING["inkling2_loop_text"](**BASE, **LOOPED)), batch()
    with collect_routing(model) as routing:
        before = logits(model, ids_BS)
    assert {layer: len(calls) for layer, calls in routing.items()} == {0: 1, 1: 3, 2: 1}
    expert = busiest(routing[1][0][0])[0]
    plan = SteeringPlan(experts=[ExpertGain(1, expert, 8.0)])
    with steer(model, plan) as audit, collect_routing(model) as routing:
        steered = logits(model, ids_BS)
    assert audit.fired[1, expert].tokens == sum(int((ids_TK == expert).sum()) for ids_TK, _ in routing[1])
    model.save_pretrained(tmp_path / "source")
    certificate = bake(tmp_path / "source", plan, tmp_path / "baked")
    assert (certificate.verdict, certificate.family) == ("exact", "verified")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "baked").eval(), ids_BS), steered)
    moe_layers(model)[1].experts.down_proj.data[expert] *= 8
    torch.testing.assert_close(logits(model, ids_BS), steered)
    assert not torch.allclose(steered, before, atol=1e-2)


@with_a_loop
def test_what_a_looped_layer_does_to_a_token_is_not_one_thing_to_observe() -> None:
    model = build_from_config(CONFIG_MAPPING["inkling2_loop_text"](**BASE, **LOOPED))
    said = "layer 1 of inkling2_loop_text runs 3 times in every forward, as layers 1-1 do"
    with pytest.raises(ValueError, match=said):
        collect_counts(model, [Trace("a#0", tuple(range(5, 20)), 4)], MarkerSet(markers=(Marker("<think>", ((3,),)),)))
    with pytest.raises(ValueError, match=said), observe_residual(model, [0, 1], print):
        pass
    seen: list[int] = []
    with observe_residual(model, [0, 2], lambda layer, _: seen.append(layer)):
        logits(model, batch())
    assert seen == [0, 2]
