"""Llama Scope (Llama-3.1-8B base): hyperparams.json and checkpoints/final.safetensors.

The SAE was trained on inputs scaled to a mean norm of sqrt(D); both that scale and the decoder norms, which the threshold
is compared with, are folded in here. The scalar threshold in the file is in units of the raw activations, as its growth with
the layer's mean norm shows (layers 8, 15, 24: 0.20, 0.33, 0.75 at norms 6.3, 10.8, 29.1), so it is scaled too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_steer.saes.sae import SAE, fold_decoder_norm, fold_input_scale, place_of_hook
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, refuse_unknown

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NORM = "dataset_average_activation_norm."
TYPES: dict[str, Any] = {
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
    config = read_config(path / CONFIG, **TYPES, dataset_average_activation_norm=dict | None, jump_relu_threshold=float)
    weights_path = path / WEIGHTS
    norms = config.get("dataset_average_activation_norm") or {}
    scale = scale_of(path, config, norms.get("in"))
    if "jump_relu_threshold" not in config:
        raise ValueError(f"{path / CONFIG} gives no jump_relu_threshold: download it again")
    threshold = float(config["jump_relu_threshold"]) * scale
    tensors = read_safetensors(weights_path)
    return build(path, config, tensors, weights_path, scale, threshold, "llama-scope", "meta-llama/Llama-3.1-8B", given)


def scale_of(path: Path, config: dict[str, Any], mean_norm: Any) -> float:
    """The factor of the inputs, sqrt(D) / mean norm; ValueError for anything but a JumpReLU SAE of this kind."""
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise ValueError(f"{path} has the activation {config['act_fn']!r}: jumprelu is expected")
    if config.get("use_glu_encoder") or config.get("apply_decoder_bias_to_pre_encoder"):
        raise ValueError(f"{path} has a GLU encoder or subtracts its decoder bias: Llama Scope's published SAEs do not")
    normalised = config.get("norm_activation", "dataset-wise")
    if normalised == "inference":
        return 1.0
    if normalised != "dataset-wise":
        raise ValueError(f"{path} normalises activations {normalised!r}: dataset-wise is expected")
    if not isinstance(mean_norm, int | float) or not mean_norm > 0:
        raise ValueError(f"{path} gives the mean activation norm as {mean_norm!r}: a number above 0 is expected")
    return math.sqrt(config["d_model"]) / mean_norm


def build(
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
    refuse_unknown(tensors, weights_path, *known, "log_jumprelu_threshold", *(k for k in tensors if k.startswith(NORM)))
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
