"""Llama Scope (Llama-3.1-8B base): hyperparams.json and checkpoints/final.safetensors.

The SAE was trained on inputs scaled to a mean norm of sqrt(D); both that scale and the decoder norms, which the threshold
is compared with, are folded in here. The scalar threshold in the file is in units of the raw activations, as its growth with
the layer's mean norm shows (layers 8, 15, 24: 0.20, 0.33, 0.75 at norms 6.3, 10.8, 29.1), so it is scaled too.

Llama Scope R1 (DeepSeek-R1-Distill-Llama-8B): config.json and sae_weights.safetensors. The same, but with the logarithm of one
threshold per atom, and with the mean norms of the activations as tensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_steer.json_files import is_number, quoted
from moe_steer.saes.sae import SAE, fold_decoder_norm, fold_input_scale, place_of_hook
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, refuse_unknown

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG_R1, WEIGHTS_R1 = "config.json", "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm."
_TYPES: dict[str, Any] = {
    "d_model": int,
    "use_glu_encoder": bool | None,
    "apply_decoder_bias_to_pre_encoder": bool | None,
    "sparsity_include_decoder_norm": bool,
    "hook_point_in": str | None,
}


def recognises(path: Path) -> bool:
    """A folder with both files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """ValueError for Llama Scope's other kinds (transcoders, per-token normalisation, GLU encoders)."""
    config = read_config(
        path / CONFIG, **_TYPES, dataset_average_activation_norm=dict | None, jump_relu_threshold=float
    )
    weights_path = path / WEIGHTS
    norms = config.get("dataset_average_activation_norm") or {}
    scale = _scale_of(path, config, norms.get("in"))
    if "jump_relu_threshold" not in config:
        raise ValueError(f"{path / CONFIG} gives no jump_relu_threshold: download it again")
    threshold = float(config["jump_relu_threshold"]) * scale
    tensors = read_safetensors(weights_path)
    return _build(
        path, config, tensors, weights_path, scale, threshold, "llama-scope", "meta-llama/Llama-3.1-8B", given
    )


def recognises_r1(path: Path) -> bool:
    """A folder with both files of R1; SAELens, which uses the second name too, calls its configuration cfg.json."""
    return (path / CONFIG_R1).is_file() and (path / WEIGHTS_R1).is_file()


def read_r1(path: Path, given: Given) -> SAE:
    """The thresholds are those of the scaled SAE, so they are only exponentiated."""
    config = read_config(path / CONFIG_R1, **_TYPES)
    weights_path = path / WEIGHTS_R1
    tensors = read_safetensors(weights_path)
    mean_norm = tensors.get(f"{_NORM}{config.get('hook_point_in')}")
    scale = _scale_of(path, config, mean_norm.item() if mean_norm is not None and mean_norm.numel() == 1 else None)
    threshold_F = pick(tensors, weights_path, "log_jumprelu_threshold").exp()
    model_name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return _build(path, config, tensors, weights_path, scale, threshold_F, "llama-scope-r1", model_name, given)


def _scale_of(path: Path, config: dict[str, Any], mean_norm: Any) -> float:
    """The factor of the inputs, sqrt(D) / mean norm; ValueError for anything but a JumpReLU SAE of this kind."""
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise ValueError(f"{path} has the activation {quoted(config['act_fn'])}: jumprelu is expected")
    if config.get("use_glu_encoder") or config.get("apply_decoder_bias_to_pre_encoder"):
        raise ValueError(f"{path} has a GLU encoder or subtracts its decoder bias: Llama Scope's published SAEs do not")
    normalised = config.get("norm_activation", "dataset-wise")
    if normalised == "inference":
        return 1.0
    if normalised != "dataset-wise":
        raise ValueError(f"{path} normalises activations {quoted(normalised)}: dataset-wise is expected")
    if not is_number(mean_norm) or not mean_norm > 0:
        raise ValueError(f"{path} gives the mean activation norm as {quoted(mean_norm)}: a number above 0 is expected")
    if config.get("d_model", 0) < 1:
        raise ValueError(f"{path} gives d_model as {config.get('d_model')}: the width of the model is expected")
    return math.sqrt(config["d_model"]) / mean_norm


def _build(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    weights_path: Path,
    scale: float,
    threshold: float | Tensor,
    format: str,
    model_name: str,
    given: Given,
) -> SAE:
    """The SAE for raw activations, from tensors for scaled ones; ``threshold`` is in the scaled SAE's units."""
    known = [f"{side}.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")]
    refuse_unknown(
        tensors, weights_path, *known, "log_jumprelu_threshold", *(k for k in tensors if k.startswith(_NORM))
    )
    encoder = pick(tensors, weights_path, "encoder.weight").T.contiguous()
    decoder = pick(tensors, weights_path, "decoder.weight").T.contiguous()
    bias = pick(tensors, weights_path, "encoder.bias")
    threshold_F = bias.new_zeros(len(bias)) + threshold
    if config.get(
        "sparsity_include_decoder_norm", True
    ):  # the published default: activations count times their atom's norm
        encoder, bias, decoder = fold_decoder_norm(encoder, bias, decoder)
    encoder, decoder, b_dec = fold_input_scale(
        encoder, decoder, pick(tensors, weights_path, "decoder.bias"), scale, scale
    )
    layer, site = place_of_hook(config.get("hook_point_in"))
    sae = SAE(
        kind="jumprelu",
        W_enc_DF=encoder,
        b_enc_F=bias,
        W_dec_FD=decoder,
        b_dec_D=b_dec,
        threshold_F=threshold_F,
        apply_b_dec_to_input=False,
        about=given.about(format, weights_path, source=path, model_name=model_name, layer=layer, site=site),
    )
    return check_sizes(sae, path, config)
