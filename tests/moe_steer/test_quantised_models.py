"""Quantised checkpoints: what their packages are missing is said in one line, and what this machine can expand is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import tiny
from moe_steer import load_model
from moe_steer.backends import plan_memory, read_config
from moe_steer.backends.blueprint import quantisation
from moe_steer.backends.memory import choose_backend
from moe_steer.backends.registry import refusal
from moe_steer.layers import moe_layers
from moe_steer.selfcheck import check_backend
from tiny_reasoners import tiny_tokenizer

MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"load_in_4bit": True}, r"pip install -U bitsandbytes"),
    "gptq": ({"bits": 4, "group_size": 32}, r"pip install optimum"),
    "awq": ({"bits": 4, "group_size": 32, "version": "gemm"}, r"pip install gptqmodel"),
    "compressed-tensors": ({"format": "pack-quantized"}, r"pip install compressed-tensors"),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, r"'torchao': pip install torchao$"),
    "quanto": ({"weights": "int8"}, r"pip install optimum-quanto"),
    "hqq": ({"quant_config": {}}, r"HQQ version"),
    "auto-round": ({"bits": 4}, r"pip install 'auto-round"),
    "sinq": ({}, r"'sinq': pip install sinq$"),
    "aqlm": ({}, r"pip install aqlm"),
}
"""Method -> (rest of its quantization_config, what the refusal names)."""
PACKAGES = {
    "auto-round": "auto_round",
    "awq": "gptqmodel",
    "gptq": "optimum",
    "compressed-tensors": "compressed_tensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    tiny.qwen2().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def declare(folder: Path, method: str, **rest: Any) -> None:
    """Write into config.json that the weights are quantised so."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **rest}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", MISSING)
@pytest.mark.parametrize("backend", ["auto", "device_map"])
def test_the_missing_package_is_named_in_one_line(method: str, backend: str, folder: Path) -> None:
    from importlib.util import find_spec

    if find_spec(PACKAGES.get(method, method)) is not None:
        pytest.skip(f"the package of {method} is here")
    rest, message = MISSING[method]
    declare(folder, method, **rest)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, backend, max_memory="cpu=1GiB" if backend == "device_map" else "")
    assert "\n" not in str(caught.value)


def test_a_method_that_the_library_does_not_know_is_refused(folder: Path) -> None:
    """It would warn, and read the numbers as if they were weights."""
    declare(folder, "magic")
    with pytest.raises(ValueError, match="quantised by 'magic', which transformers does not know"):
        load_model(folder)


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_a_method_that_is_not_named_is_refused_and_not_planned(key: str, folder: Path, tmp_path: Path) -> None:
    """MLX writes both keys, older versions one; the library's words are that the model was not correctly quantised."""
    shutil.copytree(folder, made := tmp_path / "mlx")
    config = json.loads((made / "config.json").read_text())
    config.pop("quantization_config", None)
    (made / "config.json").write_text(json.dumps({**config, key: {"group_size": 64, "bits": 4, "mode": "affine"}}))
    with pytest.raises(ValueError, match="quantised without a quant_method, as MLX does.*another checkpoint") as caught:
        load_model(made)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the size of an unnamed method's weights is not planned"):
        plan_memory(read_config(made), 1, 2**34)


def test_what_else_a_configuration_may_say_of_bits(folder: Path) -> None:
    """Of old, bitsandbytes is known by its bits alone."""
    config = json.loads((folder / "config.json").read_text())

    def said(value: Any) -> Any:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
        return quantisation(read_config(folder))

    assert (said(None), said({})) == ("", "")
    assert said({"load_in_8bit": True}) == said({"load_in_4bit": True}) == "bitsandbytes"
    for odd in ([1], "fp8"):
        with pytest.raises(ValueError, match="config.json: 'quantization_config' is .*: give an object or null"):
            said(odd)
    said(None)


def test_backends_that_cut_weights_refuse_classes_of_other_packages(folder: Path) -> None:
    """And auto does not plan a 4-bit model as if it had 16 bits."""
    declare(folder, "awq", **MISSING["awq"][0])
    config = read_config(folder)
    for backend in ("tp_ep", "zero3", "autoep"):
        assert refusal(backend, config, 2).startswith("awq weights are held whole by the classes of their own package")
    backend, reason = choose_backend(config, 1, "auto", "", 1000, True)
    assert backend == "plain"
    assert "the size of awq weights is not planned" in reason


class OwnPackage(HfQuantizer):
    """As a package's quantizer that knows linear layers and not the library's experts."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False


class OwnSettings(QuantizationConfigMixin):
    """Settings that need no package."""

    def __init__(self, quant_method: str, **rest: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.rest = rest


def test_experts_that_a_package_leaves_random_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library prints a table and goes on: compressed-tensors with one packed tensor for each expert."""
    from safetensors.torch import load_file, save_file
    from transformers.quantizers import auto

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", OwnPackage)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", OwnSettings)
    tiny.qwen3_moe().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    declare(tmp_path, "compressed-tensors", format="pack-quantized")
    tensors = load_file(tmp_path / "model.safetensors")
    beside = {"model.layers.1.self_attn.q_proj.weight_shape": torch.zeros(2)}
    save_file({**tensors, **beside}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path)  # what its format needs beside the weights is for the package to know
    packed = {
        name.replace("_proj.weight", "_proj.weight_packed") if ".experts." in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for backend in ("plain", "device_map"):
        with pytest.raises(
            ValueError, match=r"the checkpoint lacks tensor 'model\.layers\.\d\.mlp\.experts\.down_proj' \(and"
        ) as caught:
            load_model(tmp_path, backend, max_memory="cpu=1GiB" if backend == "device_map" else "")
        assert "\n" not in str(caught.value)


class PackedExperts(nn.Module):
    """As transformers' Mxfp4GptOssExperts: its kernel gets the routing in its own form."""

    def forward(self, hidden: Any, routing_data: Any, gather_idx: Any, scatter_idx: Any) -> Any:
        return hidden


class LaterPackedExperts(nn.Module):
    """As those of transformers 5.23: the block calls ``forward_routed``, and ``forward`` only where ranks share the experts."""

    def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden

    forward_routed = PackedExperts.forward


@pytest.mark.parametrize("packed", [PackedExperts, LaterPackedExperts])
def test_experts_that_take_no_ids_are_refused_by_name(packed: type[nn.Module]) -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = tiny_gpt_oss()
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            module.experts = packed()
    with pytest.raises(
        ValueError, match="experts of gpt_oss are held in MXFP4 .* load them expanded, with dtype bfloat16"
    ):
        moe_layers(model)
    names = getattr(Mxfp4GptOssExperts, "forward_routed", Mxfp4GptOssExperts.forward).__code__.co_varnames[1:5]
    assert names[1:] == PackedExperts.forward.__code__.co_varnames[2:5]


def tiny_gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=tiny.STOP,
    )
    return tiny.randomise(GptOssForCausalLM(config).to(torch.bfloat16))


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed_gpt_oss(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as gpt-oss is published; returns the experts' weights, decoded by hand: [E, in, out] each."""
    from safetensors.torch import load_file, save_file

    tiny_gpt_oss().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    declare(folder, "mxfp4", modules_to_not_convert=["lm_head", "model.embed_tokens"])
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    decoded = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inner, outer = tensors.pop(name).shape
        codes = torch.randint(16, (num_experts, outer, inner), generator=generator)
        scales = torch.randint(120, 124, (num_experts, outer, inner // 32), generator=generator)
        grouped = codes.reshape(num_experts, outer, inner // 32, 16, 2)
        tensors[name + "_blocks"] = (grouped[..., 0] + 16 * grouped[..., 1]).to(torch.uint8)
        tensors[name + "_scales"] = scales.to(torch.uint8)
        powers = 2.0 ** (scales - 127).repeat_interleave(32, -1)
        decoded[name] = (VALUES[codes] * powers).transpose(1, 2).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return decoded


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_mxfp4_is_expanded_steered_and_spread_exactly(dtype: str, tmp_path: Path) -> None:
    """``auto`` expands where the kernels are missing, as here; a precision that is asked for expands everywhere."""
    decoded = packed_gpt_oss(tmp_path / "model")
    plain, _ = load_model(tmp_path / "model", "plain", dtype=dtype)
    weights = plain.state_dict()
    assert len(decoded) == 4
    assert all(torch.equal(weights[name], tensor) for name, tensor in decoded.items())
    check_backend(plain)
    (disk := tmp_path / "disk").mkdir()
    room = sum(p.numel() * p.element_size() for p in plain.parameters()) * 3 // 4 // 1024
    spread, _ = load_model(
        tmp_path / "model", "device_map", dtype=dtype, offload=str(disk), max_memory=f"cpu={room}KiB"
    )
    assert "disk" in spread.hf_device_map.values()
    ids_BS = torch.arange(3, 40)[None]
    assert torch.equal(plain(ids_BS).logits, spread(ids_BS).logits)


def test_fp8_is_expanded_and_spread_exactly(tmp_path: Path) -> None:
    """Blocks of 128 with their scales, expanded while reading and written to disk expanded."""
    from safetensors.torch import load_file, save_file

    tiny.qwen3_moe().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    declare(tmp_path / "model", "fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = (tensors[name] * 256).to(torch.float8_e4m3fn)  # one block, partly filled
        tensors[name], tensors[f"{name}_scale_inv"] = codes, torch.full((1, 1), 1 / 256)
        decoded[name] = codes.float() / 256
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    plain, _ = load_model(tmp_path / "model", "plain", dtype="float32")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(plain.state_dict()[name], decoded[name])
    experts = plain.state_dict()["model.layers.2.mlp.experts.down_proj"]
    assert torch.equal(experts[5], decoded["model.layers.2.mlp.experts.5.down_proj.weight"])
    check_backend(plain)
    (disk := tmp_path / "disk").mkdir()
    room = sum(p.numel() * p.element_size() for p in plain.parameters()) * 3 // 4 // 1024
    spread, _ = load_model(
        tmp_path / "model", "device_map", dtype="float32", offload=str(disk), max_memory=f"cpu={room}KiB"
    )
    assert "disk" in spread.hf_device_map.values()
    ids_BS = torch.arange(3, 40)[None]
    assert torch.equal(plain(ids_BS).logits, spread(ids_BS).logits)
