"""Small SAE files as their publishers write them, each with a naive encoder of its own; nothing here uses moe_steer.saes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

D, F, K = 6, 20, 3
Array = npt.NDArray[np.float64]
Naive = Callable[[Array], tuple[Array, Array]]
"""A token [D] -> (activations [F], reconstruction [D]), one number after another."""


class Published(NamedTuple):
    """A file or folder, and what an SAE in it does to one token."""

    path: Path
    naive: Naive


def draw(seed: int = 0) -> dict[str, Array]:
    """Weights [D, F] and [F, D] whose atoms have different norms."""
    rng = np.random.default_rng(seed)
    weights = {
        "enc": rng.normal(size=(D, F)),
        "dec": rng.normal(size=(F, D)) * rng.uniform(0.3, 2, size=(F, 1)),
        "b_enc": rng.normal(size=F),
        "b_dec": rng.normal(size=D),
        "threshold": rng.uniform(0.1, 1.0, size=F),
        "gate": rng.normal(size=F),
        "r_mag": 0.3 * rng.normal(size=F),
        "b_mag": rng.normal(size=F),
    }
    return {name: np.round(256 * value) / 256 for name, value in weights.items()}  # float32 holds them exactly


def dots(x: Array, matrix: Array) -> Array:
    """x @ matrix, column by column."""
    return np.array([math.fsum(x[i] * matrix[i, j] for i in range(len(x))) for j in range(matrix.shape[1])])


def keep_top(z: Array, k: int) -> Array:
    """relu(z) at its k largest places, 0 elsewhere."""
    best = set(sorted(range(len(z)), key=lambda j: -z[j])[:k])
    return np.array([max(z[j], 0.0) if j in best else 0.0 for j in range(len(z))])


def jump(z: Array, threshold: Array) -> Array:
    """z where it is above its threshold."""
    return np.array([z[j] if z[j] > max(threshold[j], 0.0) else 0.0 for j in range(len(z))])


def tensor(array: Array, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def saelens(root: Path, architecture: str = "jumprelu", **changes: Any) -> Published:
    """A version 6 folder; ``changes`` go into cfg.json."""
    w = draw(1)
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.5.0",
            "model_name": "google/gemma-2-2b",
            "hook_name": "blocks.7.hook_resid_post",
        },
        **({"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        **changes,
    }
    tensors = {"W_enc": tensor(w["enc"]), "W_dec": tensor(w["dec"]), "b_dec": tensor(w["b_dec"])}
    if architecture == "gated":
        tensors |= {"b_gate": tensor(w["gate"]), "r_mag": tensor(w["r_mag"]), "b_mag": tensor(w["b_mag"])}
    else:
        tensors["b_enc"] = tensor(w["b_enc"])
    if architecture == "jumprelu":
        tensors["threshold"] = tensor(w["threshold"])
    folder = root / "saelens"
    _json(folder / "cfg.json", config)
    save_file(tensors, folder / "sae_weights.safetensors")
    norms = np.array([math.sqrt(sum(v * v for v in row)) for row in w["dec"]])

    def naive(x: Array) -> tuple[Array, Array]:
        y = x - w["b_dec"] * config["apply_b_dec_to_input"]
        z = dots(y, w["enc"]) + (0 if architecture == "gated" else w["b_enc"])
        if architecture == "gated":
            magnitude = np.maximum(dots(y, w["enc"]) * np.exp(w["r_mag"]) + w["b_mag"], 0)
            acts = np.where(dots(y, w["enc"]) + w["gate"] > 0, magnitude, 0)
        elif architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
            acts = keep_top(z * norms, K)
            return acts, dots(acts / norms, w["dec"]) + w["b_dec"]
        else:
            acts = {"jumprelu": lambda: jump(z, w["threshold"]), "topk": lambda: keep_top(z, K)}.get(
                architecture, lambda: np.maximum(z, 0)
            )()
        return acts, dots(acts, w["dec"]) + w["b_dec"]

    return Published(folder, naive)


def saelens_3(root: Path) -> Published:
    """The layout before version 6: no metadata, TopK as an activation function, a finetuning scale."""
    w = draw(2)
    config = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.3.hook_resid_pre",
        "hook_point_layer": 3,
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "finetuning_scaling_factor": True,
        "normalize_activations": False,
    }
    scale = np.arange(F) / 16 + 0.5
    folder = root / "saelens3"
    _json(folder / "cfg.json", config)
    save_file(
        {
            "W_enc": tensor(w["enc"]),
            "W_dec": tensor(w["dec"]),
            "b_enc": tensor(w["b_enc"]),
            "b_dec": tensor(w["b_dec"]),
            "scaling_factor": tensor(scale),
        },
        folder / "sae_weights.safetensors",
    )

    def naive(x: Array) -> tuple[Array, Array]:
        acts = keep_top(dots(x - w["b_dec"], w["enc"]) + w["b_enc"], K)
        return acts, dots(acts * scale, w["dec"]) + w["b_dec"]

    return Published(folder, naive)


def _plain_jump(w: dict[str, Array]) -> Naive:
    def naive(x: Array) -> tuple[Array, Array]:
        acts = jump(dots(x, w["enc"]) + w["b_enc"], w["threshold"])
        return acts, dots(acts, w["dec"]) + w["b_dec"]

    return naive


_GEMMA_NAMES = {"w_enc": "enc", "w_dec": "dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def gemma_scope(root: Path, repository: str = "gemma-scope-9b-it-res") -> Published:
    w = draw(3)
    folder = root / f"models--google--{repository}" / "layer_20/width_16k/average_l0_91"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: w[key].astype(np.float32) for name, key in _GEMMA_NAMES.items()})
    return Published(folder, _plain_jump(w))


def gemma_scope_2(root: Path, **changes: Any) -> Published:
    w = draw(4)
    folder = root / "resid_post/layer_12_width_16k_l0_medium"
    config = {
        "hf_hook_point_in": "model.layers.12.output",
        "hf_hook_point_out": "model.layers.12.output",
        "width": F,
        "model_name": "google/gemma-3-1b-it",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
        **changes,
    }
    _json(folder / "config.json", config)
    save_file({name: tensor(w[key]) for name, key in _GEMMA_NAMES.items()}, folder / "params.safetensors")
    return Published(folder, _plain_jump(w))


def _scaled(w: dict[str, Array], scale: float, threshold: Array, with_norm: bool) -> Naive:
    """x is scaled, encoded, masked by activation times atom norm, decoded, and scaled back. Activations count in unit atoms."""
    norms = np.array([math.sqrt(sum(v * v for v in row)) for row in w["dec"]])

    def naive(x: Array) -> tuple[Array, Array]:
        z = dots(x * scale, w["enc"]) + w["b_enc"]
        mask = jump(z * norms if with_norm else z, threshold) > 0
        acts = np.where(mask, z, 0)
        return acts * (norms if with_norm else 1), (dots(acts, w["dec"]) + w["b_dec"]) / scale

    return naive


def llama_scope(root: Path, **changes: Any) -> Published:
    w = draw(5)
    folder = root / "Llama3_1-8B-Base-L15R-8x"
    config = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.25,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 0.8, "out": 0.8},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
        **changes,
    }
    _json(folder / "hyperparams.json", config)
    (folder / "checkpoints").mkdir()
    save_file(_linear(w, torch.bfloat16), folder / "checkpoints/final.safetensors")
    w = {name: tensor(value, torch.bfloat16).double().numpy() for name, value in w.items()}
    scale = math.sqrt(D) / 0.8
    with_norm = bool(config["sparsity_include_decoder_norm"])
    return Published(folder, _scaled(w, scale, np.full(F, 0.25 * scale), with_norm))


def llama_scope_r1(root: Path, **changes: Any) -> Published:
    w = draw(6)
    folder = root / "400M-Slimpajama-400M-OpenR1-Math-220k/L20R"
    config = {
        "sae_type": "sae",
        "hook_point_in": "blocks.20.hook_resid_post",
        "hook_point_out": "blocks.20.hook_resid_post",
        "d_model": D,
        "expansion_factor": 8,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        **changes,
    }
    _json(folder / "config.json", config)
    tensors = _linear(w) | {
        "log_jumprelu_threshold": tensor(np.log(w["threshold"])),
        "dataset_average_activation_norm.blocks.20.hook_resid_post": torch.tensor(1.25),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    return Published(folder, _scaled(w, math.sqrt(D) / 1.25, w["threshold"], True))


def _linear(w: dict[str, Array], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": tensor(w["enc"].T, dtype),
        "encoder.bias": tensor(w["b_enc"], dtype),
        "decoder.weight": tensor(w["dec"].T, dtype),
        "decoder.bias": tensor(w["b_dec"], dtype),
    }


def _top(w: dict[str, Array], k: int, centred: bool) -> Naive:
    def naive(x: Array) -> tuple[Array, Array]:
        acts = keep_top(dots(x - w["b_dec"] * centred, w["enc"]) + w["b_enc"], k)
        return acts, dots(acts, w["dec"]) + w["b_dec"]

    return naive


def qwen_scope(root: Path, layers: tuple[int, ...] = (5,), config: bool = False) -> Published:
    w = draw(7)
    folder = root / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    folder.mkdir(parents=True)
    for layer in layers:
        torch.save(
            {
                "W_enc": tensor(w["enc"].T),
                "W_dec": tensor(w["dec"].T),
                "b_enc": tensor(w["b_enc"]),
                "b_dec": tensor(w["b_dec"]),
            },
            folder / f"layer{layer}.sae.pt",
        )
    if config:
        _json(folder / "config.json", {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "k": K})
    return Published(folder / f"layer{layers[0]}.sae.pt", _top(w, K, False))


def dictionary_learning(root: Path, dict_class: str = "BatchTopKSAE") -> Published:
    w = draw(8)
    folder = root / "resid_post_layer_11/trainer_1"
    trainer = {
        "trainer_class": "BatchTopKTrainer",
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "k": K,
        "layer": 11,
        "lm_name": "Qwen/Qwen2.5-7B-Instruct",
        "submodule_name": "resid_post_layer_11",
    }
    _json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 1024}})
    tensors = _linear(w)
    tensors["b_dec"] = tensors.pop("decoder.bias")
    limit = np.full(F, 0.625)
    if dict_class == "AutoEncoder":
        tensors["bias"] = tensors.pop("b_dec")
    elif dict_class == "MatryoshkaBatchTopKSAE":
        tensors = {"W_enc": tensor(w["enc"]), "W_dec": tensor(w["dec"]), "b_enc": tensor(w["b_enc"])} | {
            "b_dec": tensor(w["b_dec"])
        }
    if dict_class != "AutoEncoder":
        tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(0.625)}
    torch.save(tensors, folder / "ae.pt")

    def naive(x: Array) -> tuple[Array, Array]:
        z = dots(x - w["b_dec"], w["enc"]) + w["b_enc"]
        acts = np.maximum(z, 0) if dict_class == "AutoEncoder" else jump(z, limit)
        return acts, dots(acts, w["dec"]) + w["b_dec"]

    return Published(folder, _top(w, K, True) if dict_class == "AutoEncoderTopK" else naive)


def sparsify(root: Path, module: str = "layers.10", **changes: Any) -> Published:
    w = draw(9)
    folder = root / "sae-DeepSeek-R1-Distill-Qwen-1.5B-65k" / module
    config = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "signed": False, "d_in": D}
    _json(folder / "cfg.json", {**config, **changes})
    _json(folder.parent / "config.json", {"model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"})
    tensors = _linear(w)
    tensors["b_dec"] = tensors.pop("decoder.bias")
    del tensors["decoder.weight"]
    save_file(tensors | {"W_dec": tensor(w["dec"])}, folder / "sae.safetensors")
    return Published(folder, _top(w, K, True))


def goodfire(root: Path, k: int | None = None) -> Published:
    w = draw(10)
    path = root / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    names = {"encoder": "encoder_linear", "decoder": "decoder_linear"}
    tensors = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in _linear(w, torch.float16).items()
    }
    torch.save(tensors, path)
    w = {name: tensor(value, torch.float16).double().numpy() for name, value in w.items()}
    return Published(path, _top(w, F if k is None else k, False))


def qresearch(root: Path) -> Published:
    w = draw(11)
    path = root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    torch.save({"state_dict": _linear(w)}, path)
    return Published(path, _top(w, F, False))
