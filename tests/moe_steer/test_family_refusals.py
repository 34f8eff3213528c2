"""Models without reachable experts: refused by name everywhere, in one line, before anything is hooked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES, REFUSED, available, build
from family_cases import traces_left
from moe_steer import ExpertGain, SteeringPlan, load_model, observe_routing, steer
from moe_steer.backends import read_config, read_tokenizer
from moe_steer.backends.blueprint import skeleton
from moe_steer.lab import LAB_MODEL
from moe_steer.layers import model_shape, moe_layers
from moe_steer.thinking import render
from reasoning_evals.engines.in_process import stop_ids
from refused_models import DENSE, UNREACHABLE, build_refused


def assert_refused(model: Any, named: str) -> str:
    """Every entry point says no in one line that names the family, and hooks nothing."""
    before = traces_left(model)
    plan = SteeringPlan(experts=[ExpertGain(0, 0, 2.0)])
    messages = []
    for attempt in (
        lambda: moe_layers(model),
        lambda: observe_routing(model, print).__enter__(),
        lambda: steer(model, plan).__enter__(),
    ):
        with pytest.raises(ValueError, match=re.escape(named)) as caught:
            attempt()
        messages.append(str(caught.value))
    assert all("\n" not in message for message in messages)
    assert traces_left(model) == before
    return messages[0]


@pytest.mark.parametrize("name", [name for name in available() if name in REFUSED])
def test_families_of_the_table_that_are_refused(name: str) -> None:
    assert REFUSED[name] in assert_refused(build(name), FAMILIES[name].model_type)


@pytest.mark.parametrize("name", UNREACHABLE)
def test_unreachable_families_are_refused_by_name(name: str) -> None:
    assert_refused(build_refused(UNREACHABLE[name]), name)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_have_a_shape_and_no_experts(name: str) -> None:
    model = build_refused(DENSE[name])
    assert "dense" in assert_refused(model, name)
    shape = model_shape(model)
    assert (shape.num_experts, shape.top_k, shape.moe_layers) == (0, 0, ())
    assert shape.num_layers == len(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)))
    with steer(model, SteeringPlan()):
        assert traces_left(model) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_group": 3}, "groups are of one size"),
        ({"n_group": 0}, "groups are of one size"),
        ({"topk_group": 5}, "one to all are chosen"),
        ({"num_key_value_heads": 0}, "no model can be built from its configuration .ZeroDivisionError"),
        ({"pad_token_id": 10**6}, "no model can be built from its configuration .AssertionError"),
        ({"num_experts_per_tok": 17}, "17 of 16 experts a token"),
    ],
)
def test_configurations_that_no_model_can_have(said: dict[str, int], message: str) -> None:
    config = read_config("lab")
    for key, value in said.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        model_shape(skeleton(config, "bfloat16"))


def test_files_of_a_checkpoint_that_would_be_misread(tmp_path: Path) -> None:
    """Keys that stand twice, and a dtype that was changed in the header: 32 bits are 32 bits."""
    folder = tmp_path / "m"
    shutil.copytree(LAB_MODEL, folder)
    settings = folder / "tokenizer_config.json"
    whole = settings.read_text(encoding="utf-8")
    settings.write_text(whole.replace("{", '{"eos_token": "x",', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json holds the key 'eos_token' twice"):
        read_tokenizer(folder)
    settings.write_text(whole, encoding="utf-8")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data.replace(b'"model.norm.weight":{"dtype":"F32"', b'"model.norm.weight":{"dtype":"I32"', 1))
    assert weights.read_bytes() != data
    with pytest.raises(ValueError, match="tensor 'model.norm.weight' is stored as I32, whole numbers"):
        load_model(folder, check=False)
    weights.write_bytes(data)
    model, tokenizer = load_model(folder, check=False)
    model.generation_config.eos_token_id = [966, -1]
    with pytest.raises(ValueError, match=r"end its answers by eos_token_id \[966, -1\], and has the tokens 0 to 965"):
        stop_ids(model, tokenizer)
    tokenizer.chat_template = "Answer!"
    with pytest.raises(ValueError, match="leaves out the question"):
        render(tokenizer, [{"role": "user", "content": "What is 17 + 25?"}])


def test_masks_that_older_checkpoints_hold_are_no_weights(tmp_path: Path) -> None:
    """Pythia's ``attention.bias`` is a causal mask of truth values, which the library leaves out."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=966, **sizes)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LAB_MODEL / name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path, check=False)
