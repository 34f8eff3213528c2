"""Residual vectors: baked as a bias where there is a place for one, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake_checkpoints import gains, qwen, read_all, snapshot
from family_cases import logits
from moe_steer import ResidualVector, SteeringPlan, steer
from moe_steer.baking import bake, unbake, verify_bake

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
PLACES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True},
    "llama without biases": {},
    "smollm3": {"mlp_bias": True},
    "smollm3 without biases": {},
    "seed_oss": {"mlp_bias": True},
    "seed_oss without biases": {},
    "nemotron": {"mlp_bias": True},
    "gpt_neox": {},
    "phi": {},
    "starcoder2": {},
}


def model(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    config = CONFIG_MAPPING[name.split()[0]](**BASE, **PLACES.get(name, {}), **options)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def vectors(folder: Path, *layers: int) -> SteeringPlan:
    entries = []
    for number, layer in enumerate(layers):
        vector_D = torch.randn(16, generator=torch.Generator().manual_seed(number))
        save_file({"vector": vector_D}, folder / f"v{number}.safetensors")
        entries.append(ResidualVector(layer=layer, file=f"v{number}.safetensors", strength=1.5 - number))
    return SteeringPlan(residual=entries, base_dir=str(folder))


@pytest.mark.parametrize("name", PLACES)
def test_a_vector_becomes_a_bias(name: str, tmp_path: Path) -> None:
    source = model(name, tmp_path / "source")
    before = snapshot(source)
    plan = vectors(tmp_path, 1, 0, 1)
    certificate = bake(source, plan, tmp_path / "baked")
    assert certificate.verdict == "rounded"
    assert {entry.format for entry in certificate.entries} == {"bias in F32"}
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    ids_BS = torch.arange(3, 23).reshape(2, 10)
    with steer(original, plan):
        hooked_BSV = logits(original, ids_BS)
    torch.testing.assert_close(logits(plain, ids_BS), hooked_BSV, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(original, ids_BS), hooked_BSV, atol=1e-2)
    verify_bake(tmp_path / "baked", source)
    unbake(tmp_path / "baked", tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == before == snapshot(source)


def in_norms(folder: Path, layer: int, strength: float, residual_norm: float | None) -> ResidualVector:
    """A direction whose strength counts residual norms."""
    head = {} if residual_norm is None else {"direction": json.dumps({"layer": layer, "residual_norm": residual_norm})}
    save_file({"vector": torch.arange(16.0)}, folder / "d.safetensors", head)
    return ResidualVector(layer=layer, file="d.safetensors", strength=strength, unit="residual_norm")


def test_a_strength_in_residual_norms_is_baked_as_the_length_that_steering_adds(tmp_path: Path) -> None:
    source = model("llama", tmp_path / "source")
    plan = SteeringPlan(residual=[in_norms(tmp_path, 1, -0.25, 6.0)], base_dir=str(tmp_path))
    bake(source, plan, tmp_path / "baked")
    old, new = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "baked"))
    name = "model.layers.1.mlp.down_proj.bias"
    added_D = new.state_dict()[name].double() - old.state_dict()[name].double()
    vector_D = torch.arange(16.0).double()
    torch.testing.assert_close(added_D, -0.25 * 6.0 * vector_D / vector_D.norm(), atol=1e-7, rtol=1e-6)
    ids_BS = torch.arange(3, 23).reshape(2, 10)
    with steer(old, plan):
        hooked_BSV = logits(old, ids_BS)
    torch.testing.assert_close(logits(new, ids_BS), hooked_BSV, atol=1e-5, rtol=1e-5)
    plan = SteeringPlan(residual=[in_norms(tmp_path, 1, -0.25, None)], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match="has no residual_norm in its header"):
        bake(source, plan, tmp_path / "again")


def test_biases_that_are_new_stand_in_config_and_index(tmp_path: Path) -> None:
    source = model("llama without biases", tmp_path / "source", torch.bfloat16)
    certificate = bake(source, vectors(tmp_path, 2), tmp_path / "baked")
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["mlp_bias"] is True
    assert any("config.json now says mlp_bias: true" in note for note in certificate.notes)
    old, new = read_all(source), read_all(tmp_path / "baked")
    added = set(new) - set(old)
    assert len(added) == 3 * 3
    assert all(new[name] == old[name] for name in old)
    assert [name for name in sorted(added) if any(new[name][2])] == ["model.layers.2.mlp.down_proj.bias"]


def test_a_sharded_checkpoint_gets_biases_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**BASE)
    AutoModelForCausalLM.from_config(config).save_pretrained(source, max_shard_size="10KB")
    before = snapshot(source)
    total = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    bake(source, vectors(tmp_path, 2), tmp_path / "baked")
    grown = json.loads((tmp_path / "baked" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert grown - total == 3 * (24 + 24 + 16) * 4
    verify_bake(tmp_path / "baked", source)
    unbake(tmp_path / "baked", tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == before


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "olmo2", "granite"])
def test_no_place_no_bake(name: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"head_dim": 8} if name == "gemma2" else {}
    source = model(name, tmp_path / "source", **extra)
    plan = vectors(tmp_path, 1)
    with pytest.raises(
        ValueError, match=f"layer 1 has no place in {name}: steer in process, or export it as a GGUF control vector"
    ):
        bake(source, plan, tmp_path / "baked")


def test_other_refusals(tmp_path: Path) -> None:
    plan = vectors(tmp_path, 1)
    with pytest.raises(ValueError, match="has no place in qwen3_moe"):
        bake(
            qwen(tmp_path / "experts"),
            SteeringPlan(residual=[ResidualVector(1, narrow(tmp_path))], base_dir="/"),
            tmp_path / "baked",
        )
    source = model("llama", tmp_path / "source")
    for scope in ("thought", "step_end:paragraph", "after:0"):
        scoped = SteeringPlan(residual=[ResidualVector(1, "v0.safetensors", scope=scope)], base_dir=str(tmp_path))
        with pytest.raises(ValueError, match=f"a plan with scope '{scope}' cannot be baked"):
            bake(source, scoped, tmp_path / "baked")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="has no place in a quantised checkpoint"):
        bake(source, plan, tmp_path / "baked")
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="residual layer 1 does not exist"):
        bake(source, plan, tmp_path / "baked")
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 12}))
    with pytest.raises(ValueError, match="has width 16, the model's residual stream has 12"):
        bake(source, plan, tmp_path / "baked")


def narrow(folder: Path) -> str:
    save_file({"vector": torch.ones(8)}, folder / "narrow.safetensors")
    return str(folder / "narrow.safetensors")


def test_gains_and_no_vectors_leave_dense_parts_alone(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    neutral = [ResidualVector(1, narrow(tmp_path), strength=0.0)]
    certificate = bake(source, SteeringPlan(experts=gains((1, 2, 2.0)).experts, residual=neutral), tmp_path / "baked")
    assert certificate.verdict == "exact"
