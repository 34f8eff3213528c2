"""Where an expert lies in a checkpoint, and which plans and checkpoints are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bake_checkpoints import QWEN_CONFIG, gains, qwen, qwen_tensors, read_all, tensor_of, write_checkpoint
from moe_steer import SteeringPlan
from moe_steer.baking import bake

BASE = {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 8}


def single(
    prefix: str, down: str = "down_proj", others: tuple[str, ...] = ("gate_proj", "up_proj")
) -> dict[str, Tensor]:
    """One layer of four experts, a tensor each."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for expert in range(4):
        for name in (*others, down):
            tensors[f"{prefix}.{expert}.{name}.weight"] = torch.randn(8, 8, generator=generator)
    return tensors


def fused(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "hub qwen3.5": (
        {"model_type": "qwen3_5_moe", "text_config": {**BASE, "model_type": "qwen3_5_moe_text"}},
        fused("model.language_model.layers.1.mlp.experts.down_proj", 4, 8, 16),
        "model.language_model.layers.1.mlp.experts.down_proj",
    ),
    "old qwen3-vl, transposed": (
        {"model_type": "qwen3_vl_moe", "text_config": {**BASE, "model_type": "qwen3_vl_moe_text"}},
        fused("model.language_model.layers.1.mlp.experts.down_proj", 4, 16, 8),
        "model.language_model.layers.1.mlp.experts.down_proj",
    ),
    "granite": (
        {"model_type": "granitemoe", "num_hidden_layers": 2, "num_local_experts": 4},
        fused("model.layers.1.block_sparse_moe.output_linear.weight", 4, 8, 16),
        "model.layers.1.block_sparse_moe.output_linear.weight",
    ),
    "dbrx": (
        {"model_type": "dbrx", "n_layers": 2, "d_model": 8, "ffn_config": {"moe_num_experts": 4}},
        fused("transformer.blocks.1.ffn.experts.mlp.w2", 24, 8),
        "transformer.blocks.1.ffn.experts.mlp.w2",
    ),
    "inkling, as published": (
        {"model_type": "inkling_mm_model", "text_config": {**BASE, "model_type": "inkling_text"}},
        fused("model.llm.layers.1.mlp.experts.w2_weight", 4, 8, 16),
        "model.llm.layers.1.mlp.experts.w2_weight",
    ),
    "mixtral": (
        {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4},
        single("model.layers.1.block_sparse_moe.experts", "w2", ("w1", "w3")),
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    ),
    "kimi-k2": (
        {"model_type": "kimi_k2", "num_hidden_layers": 2, "n_routed_experts": 4},
        single("model.layers.1.mlp.experts"),
        "model.layers.1.mlp.experts.2.down_proj.weight",
    ),
    "deepseek-v4": (
        {"model_type": "deepseek_v4", "num_hidden_layers": 2, "n_routed_experts": 4},
        single("layers.1.ffn.experts", "w2", ("w1", "w3")),
        "layers.1.ffn.experts.2.w2.weight",
    ),
    "nemotron-h": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "ME", "n_routed_experts": 4},
        single("backbone.layers.1.mixer.experts", others=("up_proj",)),
        "backbone.layers.1.mixer.experts.2.down_proj.weight",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_expert_and_nothing_else_is_scaled(name: str, tmp_path: Path) -> None:
    config, tensors, target = LAYOUTS[name]
    source = write_checkpoint(tmp_path / "source", config, tensors)
    certificate = bake(source, gains((1, 2, 8.0)), tmp_path / "baked")
    assert (certificate.verdict, certificate.family, certificate.entries[0].tensors) == ("exact", "verified", (target,))
    after = {key: tensor_of(item) for key, item in read_all(tmp_path / "baked").items()}
    for key, before in tensors.items():
        want = before.clone()
        if key == target:
            rows = want.reshape(4, -1) if want.shape[0] != 8 or "experts.mlp" in key else want.reshape(1, -1)
            rows[2 if len(rows) == 4 else 0] *= 8
        assert torch.equal(after[key], want), key


def test_gemma4_takes_its_native_scale_where_that_is_exact(tmp_path: Path) -> None:
    config = {"model_type": "gemma4", "text_config": {**BASE, "model_type": "gemma4_text"}}
    scale = torch.tensor([0.7, 1.1, 0.9, 1.3]).bfloat16()
    tensors = {
        "model.language_model.layers.1.router.per_expert_scale": scale,
        "model.language_model.layers.1.experts.down_proj": torch.randn(4, 8, 16).bfloat16(),
    }
    source = write_checkpoint(tmp_path / "source", config, tensors)
    exact = bake(source, gains((1, 2, 64.0)), tmp_path / "exact").entries[0]
    assert (exact.tensors, exact.verdict) == (("model.language_model.layers.1.router.per_expert_scale",), "exact")
    assert (
        tensor_of(read_all(tmp_path / "exact")[exact.tensors[0]]).tolist()
        == (scale * torch.tensor([1, 1, 64, 1])).tolist()
    )
    # Elsewhere one rounded scale may shift the expert by 0.4 %: the place that loses less is taken.
    formats = set()
    for number in range(10):
        gain = 1.3 + number / 9
        entry = bake(source, gains((1, 1, gain)), tmp_path / str(number)).entries[0]
        native = float((scale[1].double() * gain).bfloat16().double() / (scale[1].double() * gain) - 1)
        assert entry.rms <= abs(native) + 1e-12
        assert entry.rms < 2.5e-3
        formats.add(entry.format)
    assert formats == {"one scale an expert", "plain weights"}


def test_an_unknown_type_with_plain_names_is_baked_by_structure(tmp_path: Path) -> None:
    config = {**BASE, "model_type": "tomorrows_moe"}
    source = write_checkpoint(tmp_path / "source", config, single("model.layers.1.mlp.experts"))
    certificate = bake(source, gains((1, 2, 8.0)), tmp_path / "baked")
    assert certificate.family == "by structure"
    assert any("'tomorrows_moe' is not in the table" in note for note in certificate.notes)


def test_the_layers_of_multi_token_prediction_are_no_layers_of_the_decoder(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "n_routed_experts": 4}
    tensors = (
        single("model.layers.1.mlp.experts") | single("model.layers.2.mlp.experts") | single("mtp.layers.0.mlp.experts")
    )
    source = write_checkpoint(tmp_path / "source", config, tensors)
    certificate = bake(source, gains((1, 2, 8.0)), tmp_path / "baked")
    assert any("layer 2 (multi-token prediction) is unchanged" in note for note in certificate.notes)
    with pytest.raises(
        ValueError, match=r"layer 2 \(expert 2\) has no experts in this model: layers with experts are 1"
    ):
        bake(source, gains((2, 2, 8.0)), tmp_path / "again")


def llama4() -> dict[str, Tensor]:
    return fused("language_model.model.layers.1.feed_forward.experts.down_proj", 4, 16, 8)


def longcat() -> dict[str, Tensor]:
    return single("model.layers.1.mlp.experts")


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Tensor], SteeringPlan, str]] = {
    "renormalised": (QWEN_CONFIG, qwen_tensors(), gains((1, 2, 2.0), renormalize=True), "a plan with renormalize cannot be baked"),
    "scoped": (QWEN_CONFIG, qwen_tensors(), gains((1, 2, 2.0), scope="thought"), "a plan with scope 'thought' cannot be baked"),
    "llama 4": (
        {"model_type": "llama4", "text_config": {**BASE, "model_type": "llama4_text"}},
        llama4(),
        gains((1, 2, 2.0)),
        r"llama4 cannot be baked: the router's score scales what goes into the expert",
    ),
    "muse spark": (
        {**BASE, "model_type": "muse_spark"},
        single("model.layers.1.mlp.experts"),
        gains((1, 2, 2.0)),
        r"muse_spark cannot be baked: a norm follows every expert \(post_expert_norm\)",
    ),
    "zero expert": (
        {"model_type": "longcat_flash", "num_layers": 2, "n_routed_experts": 4, "zero_expert_num": 2},
        longcat(),
        gains((1, 5, 2.0)),
        "expert 5 at layer 1 is a zero expert",
    ),
    "expert out of range": (QWEN_CONFIG, qwen_tensors(), gains((1, 4, 2.0)), "expert 4 at layer 1 does not exist: this model has experts 0-3"),
    "layer out of range": (QWEN_CONFIG, qwen_tensors(), gains((2, 0, 2.0)), r"layer 2 \(expert 0\) has no experts in this model"),
    "another model": (
        QWEN_CONFIG,
        qwen_tensors(),
        gains((1, 2, 2.0), model={"model_type": "olmoe", "num_layers": 2, "num_experts": 4, "name": "x"}),
        "the plan was made for model_type 'olmoe', this model has 'qwen3_moe'",
    ),
    "dense": (
        {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 8},
        {"model.layers.0.mlp.down_proj.weight": torch.ones(8, 8)},
        gains((1, 2, 2.0)),
        "the plan names experts, but qwen2 is a dense model",
    ),
    "a norm beside unknown experts": (
        {**BASE, "model_type": "tomorrows_moe"},
        single("model.layers.1.mlp.experts") | {"model.layers.1.mlp.experts.post_expert_norm.weight": torch.ones(8)},
        gains((1, 2, 2.0)),
        "model type 'tomorrows_moe' is unknown and also has model.layers.1.mlp.experts.post_expert_norm.weight",
    ),
    "two sets of experts": (
        {**BASE, "model_type": "tomorrows_moe"},
        single("model.layers.1.mlp.experts") | single("model.layers.1.moe.experts"),
        gains((1, 2, 2.0)),
        "layer 1 has several sets of experts",
    ),
    "two stacks": (
        {**BASE, "model_type": "qwen3_omni_moe"},
        single("thinker.model.layers.1.mlp.experts") | single("talker.model.layers.1.mlp.experts"),
        gains((1, 2, 2.0)),
        r"several stacks of layers with experts \(talker.model.layers, thinker.model.layers\)",
    ),
    "config and tensors at odds": (
        {**QWEN_CONFIG, "num_experts": 8},
        qwen_tensors(),
        gains((1, 2, 2.0)),
        "config.json says 8 experts, and layer 0 has tensors of 4",
    ),
    "an expert missing": (
        QWEN_CONFIG,
        {key: value for key, value in qwen_tensors().items() if "layers.1.mlp.experts.2." not in key},
        gains((1, 2, 2.0)),
        "layer 1 expert 2 has no tensors in this checkpoint, which has experts 0-1, 3",
    ),
    "one scale for all": (
        {**BASE, "model_type": "qwen3_vl_moe"},
        {
            "model.layers.1.mlp.experts.down_proj": torch.ones(4, 8, 16).to(torch.float8_e4m3fn),
            "model.layers.1.mlp.experts.down_proj_scale": torch.ones(1),
        },
        gains((1, 2, 2.0)),
        r"down_proj_scale has shape \[1\] and expert 2 cannot be told apart in it among 4",
    ),
    "float16 overflows": (
        QWEN_CONFIG,
        {key: value.half() for key, value in qwen_tensors().items()},
        gains((1, 2, 2.0**17)),
        r"gain 131072 takes \d+ numbers of .* out of the range of F16: give a gain nearer to 1",
    ),
    "no layers": ({"model_type": "qwen3_moe"}, qwen_tensors(), gains((1, 2, 2.0)), "num_hidden_layers is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_baked_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    config, tensors, plan, message = REFUSALS[name]
    source = write_checkpoint(tmp_path / "source", config, tensors)
    with pytest.raises(ValueError, match=message):
        bake(source, plan, tmp_path / "deep" / "baked")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_plan_for_the_text_part_fits_the_whole_checkpoint(tmp_path: Path) -> None:
    config, tensors, _ = LAYOUTS["hub qwen3.5"]
    source = write_checkpoint(tmp_path / "source", config, tensors)
    for number, model_type in enumerate(("qwen3_5_moe", "qwen3_5_moe_text")):
        plan = gains((1, 2, 2.0), model={"model_type": model_type, "num_layers": 2, "num_experts": 4, "name": ""})
        assert bake(source, plan, tmp_path / str(number)).verdict == "exact"


def test_loss_below_the_smallest_number_is_not_called_exact(tmp_path: Path) -> None:
    tensors = {key: value.half() for key, value in qwen_tensors().items()}
    source = write_checkpoint(tmp_path / "source", QWEN_CONFIG, tensors)
    entry = bake(source, gains((1, 2, 2.0**-14)), tmp_path / "baked").entries[0]
    assert entry.verdict == "rounded"
    assert not entry.reversible
    assert entry.bound >= entry.worst > 2**-11


def test_a_neutral_plan_bakes_to_the_same_checkpoint(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    certificate = bake(source, gains((1, 2, 1.0)), tmp_path / "baked", overlay="in-order")
    assert (certificate.verdict, certificate.changed_tensors) == ("exact", 0)
    assert read_all(tmp_path / "baked") == read_all(source)
