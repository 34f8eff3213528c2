"""Quantised checkpoints: dequantised before times the gain is dequantised after, by formulas written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bake_checkpoints import (
    QWEN_CONFIG,
    gains,
    qwen_tensors,
    raw,
    read_all,
    read_shard,
    tensor_of,
    write_checkpoint,
    write_shard,
)
from family_cases import logits
from moe_steer import steer
from moe_steer.baking import bake
from tiny import deepseek_v3, hook_count

DOWN = "model.layers.1.mlp.experts.2.down_proj"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
Parts = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def codes(*shape: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def blocks(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """A scale a block, spread over the block."""
    rows, columns = shape[0] // scale.shape[0], shape[1] // scale.shape[1]
    return scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def spread(p: Parts, scale: str) -> Tensor:
    payload = next(p[key] for key in ("weight", "weight_packed") if key in p)
    return payload.double() * blocks(p[scale], (payload.shape[0], payload.shape[1]))


@dataclass(frozen=True)
class Case:
    """Parts of a down projection [8, 16] as stored, how they are turned back, and what a gain changes."""

    parts: Parts
    weight: Callable[[Parts], Tensor]
    changed: tuple[str, ...]
    format: str
    powers_only: bool = False


def fp8() -> Tensor:
    return random(8, 16).to(E4M3)


CASES = {
    "fp8 blocks": Case(
        {"weight": fp8(), "weight_scale_inv": random(2, 2).abs()},
        lambda p: spread(p, "weight_scale_inv"),
        ("weight_scale_inv",),
        "FP8 with block scales",
    ),
    "fp8 blocks, bfloat16 scales and a bias": Case(
        {"weight": fp8(), "weight_scale_inv": random(2, 2).abs().bfloat16(), "bias": random(8)},
        lambda p: spread(p, "weight_scale_inv") + p["bias"].double()[:, None],
        ("weight_scale_inv", "bias"),
        "FP8 with block scales",
    ),
    "fp8 blocks, ue8m0": Case(
        {"weight": fp8(), "weight_scale_inv": torch.full((2, 2), 0.25).to(E8M0)},
        lambda p: p["weight"].double() * blocks(p["weight_scale_inv"].float(), (8, 16)),
        ("weight_scale_inv",),
        "FP8 with block scales",
        powers_only=True,
    ),
    "fp8 per tensor": Case(
        {"weight": fp8(), "weight_scale": torch.tensor(0.013), "input_scale": torch.tensor(0.4)},
        lambda p: p["weight"].double() * p["weight_scale"].double(),
        ("weight_scale",),
        "FP8 or INT8 with scales",
    ),
    "fp8 per channel": Case(
        {"weight": fp8(), "weight_scale": random(8, 1).abs().bfloat16()},
        lambda p: p["weight"].double() * p["weight_scale"].double(),
        ("weight_scale",),
        "FP8 or INT8 with scales",
    ),
    "int8": Case(
        {"weight": codes(8, 16, high=128).to(torch.int8), "weight_scale": random(8, 1).abs()},
        lambda p: p["weight"].double() * p["weight_scale"].double(),
        ("weight_scale",),
        "FP8 or INT8 with scales",
    ),
    "mistral": Case(
        {"weight": fp8(), "qscale_weight": torch.tensor(0.02), "qscale_act": torch.tensor(0.5)},
        lambda p: p["weight"].double() * p["qscale_weight"].double(),
        ("qscale_weight",),
        "FP8 with scales (Mistral)",
    ),
    "deepseek v4": Case(
        {"weight": codes(8, 8, high=128).to(torch.int8), "scale": torch.full((8, 1), 2.0**-9).to(E8M0)},
        lambda p: p["weight"].double() * p["scale"].float().double(),
        ("scale",),
        "FP8 or FP4 with scales",
        powers_only=True,
    ),
    "nvfp4, modelopt": Case(
        {"weight": codes(8, 8).to(torch.uint8), "weight_scale": random(8, 1).abs().to(E4M3), "weight_scale_2": torch.tensor(0.003), "input_scale": torch.tensor(1.0)},
        lambda p: p["weight"].double() * p["weight_scale"].double() * p["weight_scale_2"].double(),
        ("weight_scale_2",),
        "NVFP4 (ModelOpt)",
    ),
    "nvfp4, compressed-tensors": Case(
        {"weight_packed": codes(8, 8).to(torch.uint8), "weight_scale": random(8, 1).abs().to(E4M3), "weight_global_scale": torch.tensor([711.0])},
        lambda p: p["weight_packed"].double() * p["weight_scale"].double() / p["weight_global_scale"].double(),
        ("weight_global_scale",),
        "NVFP4 (compressed-tensors)",
    ),
    "int4, compressed-tensors": Case(
        {
            "weight_packed": codes(8, 2),
            "weight_scale": random(8, 2).abs().bfloat16(),
            "weight_zero_point": codes(1, 2),
            "weight_shape": torch.tensor([8, 16]),
        },
        lambda p: p["weight_packed"].double() * p["weight_scale"].double(),
        ("weight_scale",),
        "packed integers (compressed-tensors)",
    ),
    "mxfp4, compressed-tensors": Case(
        {"weight_packed": codes(8, 8).to(torch.uint8), "weight_scale": torch.full((8, 1), 120, dtype=torch.uint8)},
        lambda p: p["weight_packed"].double() * torch.exp2(p["weight_scale"].double() - 127),
        ("weight_scale",),
        "packed integers (compressed-tensors)",
        powers_only=True,
    ),
    "gptq": Case(
        {"qweight": codes(2, 8), "qzeros": codes(2, 1), "scales": random(2, 8).abs().half(), "g_idx": torch.arange(16).int()},
        lambda p: p["qweight"].double() * p["scales"].double(),
        ("scales",),
        "GPTQ or AWQ",
    ),
}  # fmt: skip


def quantised(folder: Path, parts: Parts, config: dict[str, Any] | None = None) -> Path:
    """A Qwen3-MoE checkpoint in which one down projection is stored in parts."""
    tensors = {name: tensor for name, tensor in qwen_tensors().items() if not name.startswith(DOWN + ".")}
    tensors |= {f"{DOWN}.{role}": tensor for role, tensor in parts.items()}
    return write_checkpoint(folder, {**QWEN_CONFIG, **(config or {})}, tensors)


def read_parts(folder: Path) -> Parts:
    found = read_all(folder)
    return {
        name.removeprefix(DOWN + "."): tensor_of(item) for name, item in found.items() if name.startswith(DOWN + ".")
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gain", [64.0, 0.5])
def test_powers_of_two_scale_the_output_exactly(name: str, gain: float, tmp_path: Path) -> None:
    it = CASES[name]
    source = quantised(tmp_path / "source", it.parts)
    certificate = bake(source, gains((1, 2, gain)), tmp_path / "baked")
    assert (certificate.verdict, certificate.entries[0].format) == ("exact", it.format)
    after = read_parts(tmp_path / "baked")
    assert torch.equal(it.weight(after), it.weight(it.parts) * gain)
    assert {role for role in after if raw(after[role]) != raw(it.parts[role])} == set(it.changed)
    rest_before, rest_after = read_all(source), read_all(tmp_path / "baked")
    assert {key for key in rest_before if rest_before[key] != rest_after[key]} == {
        f"{DOWN}.{role}" for role in it.changed
    }


@pytest.mark.parametrize("name", [name for name, it in CASES.items() if not it.powers_only])
@pytest.mark.parametrize("gain", [3.0, 0.7])
def test_other_gains_stay_within_the_certified_bound(name: str, gain: float, tmp_path: Path) -> None:
    it = CASES[name]
    certificate = bake(quantised(tmp_path / "source", it.parts), gains((1, 2, gain)), tmp_path / "baked")
    entry = certificate.entries[0]
    assert entry.verdict == "rounded"
    want, got = it.weight(it.parts) * gain, it.weight(read_parts(tmp_path / "baked"))
    if "bias" not in it.parts:
        relative = ((got - want) / want).abs().nan_to_num(0.0).max()
        assert relative <= entry.worst * (1 + 1e-6) + 1e-15
    assert entry.worst <= entry.bound <= 2**-8


@pytest.mark.parametrize("name", [name for name, it in CASES.items() if it.powers_only])
def test_bare_exponents_take_powers_of_two_or_a_rounded_gain(name: str, tmp_path: Path) -> None:
    it = CASES[name]
    source = quantised(tmp_path / "source", it.parts)
    with pytest.raises(
        ValueError, match="hold only powers of two, and gain 10 is not one: take 8, or let --round do so"
    ):
        bake(source, gains((1, 2, 10.0)), tmp_path / "baked")
    with pytest.raises(ValueError, match="cannot be 0: silence it with a small gain"):
        bake(source, gains((1, 2, 0.0)), tmp_path / "baked")
    with pytest.raises(ValueError, match="out of the range of"):
        bake(source, gains((1, 2, 2.0**-200)), tmp_path / "baked")
    certificate = bake(source, gains((1, 2, 10.0)), tmp_path / "baked", round_gains=True)
    (entry,) = certificate.entries
    assert (certificate.verdict, entry.gain, entry.applied) == ("rounded", 10.0, 8.0), "of what was asked for"
    assert (entry.rounding, entry.reversible) == (0.0, True)
    assert certificate.bound == entry.bound == entry.worst == pytest.approx(0.2)
    assert any("gain 10 was baked as 8" in note for note in certificate.notes)
    assert torch.equal(it.weight(read_parts(tmp_path / "baked")), it.weight(it.parts) * 8)


def test_scales_that_are_declared_powers_of_two_stay_so(tmp_path: Path) -> None:
    """From DeepSeek-V3.1 on float32 scales are marked ue8m0; weights that are not quantised are not meant."""
    config = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}
    source = quantised(tmp_path / "source", CASES["fp8 blocks"].parts, config)
    with pytest.raises(ValueError, match="layer 1 expert 2 .* only powers of two"):
        bake(source, gains((1, 2, 3.0)), tmp_path / "baked")
    assert bake(source, gains((1, 2, 4.0)), tmp_path / "baked").verdict == "exact"
    assert bake(source, gains((1, 1, 3.0)), tmp_path / "plain").verdict == "rounded"


def test_a_stored_inverse_cannot_be_silenced(tmp_path: Path) -> None:
    source = quantised(tmp_path / "source", CASES["nvfp4, compressed-tensors"].parts)
    with pytest.raises(ValueError, match="cannot be 0"):
        bake(source, gains((1, 2, 0.0)), tmp_path / "baked")


@pytest.mark.parametrize(
    "parts",
    [
        {"weight": fp8()},
        {"weight": random(8, 16), "output_scale": torch.tensor(2.0)},
        {"weight": codes(64, 1).to(torch.uint8), "weight.absmax": random(2), "weight.quant_map": random(16)},
        {"weight_packed": codes(8, 8).to(torch.uint8), "weight_scale": random(8, 1).to(E4M3)},
    ],
)
def test_unknown_formats_are_refused_with_what_was_found(parts: Parts, tmp_path: Path) -> None:
    source = quantised(tmp_path / "source", parts)
    with pytest.raises(
        ValueError, match=r"layer 1 expert 2 is stored as .*, which is not a known number format: bake the unq"
    ):
        bake(source, gains((1, 2, 2.0)), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_fp8_block_scales_in_the_librarys_own_reading(tmp_path: Path) -> None:
    """A tiny DeepSeek-V3 quantised to FP8 in blocks of 16: transformers dequantises source and baked checkpoint."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = deepseek_v3()
    assert hook_count(model) == 0
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = {name: tensor_of(item) for name, item in read_shard(path).items()}
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        grid = tensors[name].reshape(rows // 16, 16, columns // 16, 16)
        scale = grid.abs().amax((1, 3)) / 448
        tensors[name] = (grid / scale[:, None, :, None]).reshape(rows, columns).to(E4M3)
        tensors[name + "_scale_inv"] = scale
    write_shard(path, {name: raw(tensor) for name, tensor in tensors.items()})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    plain = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
        "modules_to_not_convert": plain,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    plan = gains((1, 3, 64.0), (3, 5, 0.25), (2, 1, 16.0))
    certificate = bake(tmp_path / "source", plan, tmp_path / "baked", overlay="in-order")
    assert certificate.verdict == "exact"
    assert certificate.changed_bytes == 3 * 4 * 2 * 4  # [64, 32] in blocks of 16, float32

    def load(folder: str) -> Any:
        how = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
        options = {"dtype": torch.float32, "experts_implementation": "eager", "quantization_config": how}
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options).eval()

    ids_BS = torch.arange(3, 63).reshape(2, 30)
    original = load("source")
    with steer(original, plan) as audit:
        hooked_BSV = logits(original, ids_BS)
    assert all(fired.tokens for fired in audit.fired.values())
    assert torch.equal(logits(load("baked"), ids_BS), hooked_BSV)


def test_mxfp4_in_the_librarys_own_reading(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks, exponents and biases, fused over the experts."""
    from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

    from families import build

    base = build("gpt_oss").config.to_dict()
    config = GptOssConfig(**{**base, "intermediate_size": 64, "hidden_size": 32})
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = {name: tensor_of(item) for name, item in read_shard(path).items()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inner, outer = tensors.pop(name).shape
        tensors[name + "_blocks"] = codes(num_experts, outer, inner // 32, 16).to(torch.uint8)
        tensors[name + "_scales"] = 118 + codes(num_experts, outer, inner // 32, high=6).to(torch.uint8)
        tensors[name + "_bias"] = random(num_experts, outer).bfloat16()
    write_shard(path, {name: raw(tensor) for name, tensor in tensors.items()})
    saved = json.loads((tmp_path / "source" / "config.json").read_text())
    saved["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(saved))
    plan = gains((0, 3, 16.0), (1, 5, 0.25), (1, 2, 4.0))
    certificate = bake(tmp_path / "source", plan, tmp_path / "baked")
    assert (certificate.verdict, certificate.entries[0].format) == ("exact", "MXFP4")
    names = ("model.layers.0.mlp.experts.down_proj_scales", "model.layers.0.mlp.experts.down_proj_bias")
    assert certificate.entries[0].tensors == names

    def load(folder: str) -> Any:
        options = {"quantization_config": Mxfp4Config(dequantize=True), "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16, **options).eval()

    ids_BS = torch.arange(3, 63).reshape(2, 30)
    original = load("source")
    with steer(original, plan) as audit:
        hooked_BSV = logits(original, ids_BS)
    assert all(fired.tokens for fired in audit.fired.values())
    assert torch.equal(logits(load("baked"), ids_BS), hooked_BSV)
    assert not torch.equal(logits(original, ids_BS), hooked_BSV)
