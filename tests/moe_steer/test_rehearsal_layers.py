"""A rehearsal that runs the first and the last layer of each kind finds what one of all layers finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import config_of
from launch.recipes import load_recipe
from moe_steer.backends import allocations, rehearsal
from moe_steer.backends.blueprint import skeleton

REACHED = ["deepseek_v3", "qwen3_moe", "gpt_oss", "mixtral", "olmoe", "cohere2_moe", "glm4_moe"]
"""Families of the library's own caches: full, sliding and latent attention, dense layers before those with experts."""
WHOLE = ["qwen3_next", "jamba", "glm_moe_dsa"]
"""Families with states, or with a choice among keys: all of their layers run."""


def deep(name: str) -> Any:
    """The tiny family with four times its layers, in the same order of kinds."""
    config = config_of(name)
    text = config.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value * 4)
    text.num_hidden_layers *= 4
    return skeleton(config, "float32")


def both(model: Any, monkeypatch: pytest.MonkeyPatch, *sizes: int) -> list[tuple[Any, Any]]:
    """What is found with stand-ins, and with all layers."""
    stand_ins, found = rehearsal._stand_ins, []
    for every_layer in (False, True):
        monkeypatch.setattr(rehearsal, "_stand_ins", lambda m, a, e, every=every_layer: stand_ins(m, a, e or every))
        found.append((rehearsal.rehearse(model, 2, sizes[0]), rehearsal.rehearse_step(model, 2, sizes[1])))
    return found


@pytest.mark.parametrize("name", [*REACHED, *WHOLE])
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(name)
    short, whole = both(model, monkeypatch, 20, 40)
    for mine, all_layers in zip(short, whole, strict=True):
        assert mine.cache == all_layers.cache > 0
        # Positions that earlier layers keep are not there: some bytes.
        assert mine.activations == pytest.approx(all_layers.activations, rel=1e-3)
    assert not any(isinstance(module, rehearsal._StandIn) for module in model.modules()), "the layers are back"


def test_a_published_model_skips_nearly_all_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CONFIG_MAPPING

    shape = dict(load_recipe("qwen3-30b-1xh100").shape)
    model = skeleton(CONFIG_MAPPING[shape.pop("model_type")](**shape), "bfloat16")
    with rehearsal._stand_ins(model, rehearsal.Allocations(), every_layer=False) as skipped:
        assert len(skipped) == 46
        assert model.model.layers[7].self_attn.layer_idx == 7, "a stand-in answers for its layer"
    short, whole = both(model, monkeypatch, 64, 128)
    assert short == whole


@pytest.mark.parametrize("name", WHOLE)
def test_families_that_run_all_layers_are_not_cut(name: str) -> None:
    with rehearsal._stand_ins(deep(name), rehearsal.Allocations(), every_layer=False) as skipped:
        assert skipped == []


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen3_next", "glm_moe_dsa"])
def test_what_is_remembered_of_calls_changes_no_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = deep(name), []
    for remembers in (True, False):
        if not remembers:
            monkeypatch.setattr(allocations, "makes_all_new", lambda call: False)
        found.append((rehearsal.rehearse(model, 2, 20), rehearsal.rehearse_step(model, 2, 40)))
    assert found[0] == found[1]


def test_what_an_operator_hands_back_of_what_it_was_given_is_not_new() -> None:
    """Neither what its schema calls a view nor what it does not."""
    given = torch.empty(4, 6, device="meta")
    with allocations.Allocations() as counted:
        kept = [torch.ops.aten._unsafe_view(given, [6, 4]) for _ in range(2)] + [given.view(6, 4), given.t()]
        assert (counted.peak, len(kept)) == (0, 4)
        more = [given * 2 for _ in range(3)]
        assert counted.peak == 3 * 96
        assert {one.stride() for one in more} == {(6, 1)}
