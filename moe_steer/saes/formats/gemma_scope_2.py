"""Gemma Scope 2 (Gemma 3): params.safetensors and config.json."""

from __future__ import annotations

from pathlib import Path

from moe_steer.saes.sae import SAE, place_of_hook
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, refuse_unknown

CONFIG, WEIGHTS = "config.json", "params.safetensors"


def recognises(path: Path) -> bool:
    """A folder with both files."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path, given: Given) -> SAE:
    """JumpReLU; ValueError for the transcoders of the same collection, which map one site to another."""
    config = read_config(
        path / CONFIG,
        hf_hook_point_in=str | None,
        affine_connection=bool | None,
        model_name=str | None,
        width=int | None,
    )
    weights_path = path / WEIGHTS
    hook_in = config.get("hf_hook_point_in")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{path} has the architecture {config['architecture']!r}: jump_relu is expected")
    tensors = read_safetensors(weights_path)
    refuse_unknown(tensors, weights_path, "w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    layer, site = place_of_hook(hook_in)
    sae = SAE(
        kind="jumprelu",
        W_enc_DF=pick(tensors, weights_path, "w_enc"),
        b_enc_F=pick(tensors, weights_path, "b_enc"),
        W_dec_FD=pick(tensors, weights_path, "w_dec"),
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        threshold_F=pick(tensors, weights_path, "threshold"),
        apply_b_dec_to_input=False,
        about=given.about(
            "gemma-scope-2", weights_path, source=path, model_name=config.get("model_name"), layer=layer, site=site
        ),
    )
    return check_sizes(sae, path / CONFIG, {**config, "d_sae": config.get("width")})
