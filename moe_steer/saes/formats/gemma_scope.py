"""Gemma Scope (Gemma 2): only params.npz; model, layer and site are in the download path. Gemma Scope 2 (Gemma 3): the same
tensors in params.safetensors, and config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moe_steer.json_files import quoted
from moe_steer.saes.sae import SAE, place_of_hook
from moe_steer.saes.weights import (
    Given,
    check_sizes,
    pick,
    read_config,
    read_npz,
    read_safetensors,
    refuse_unknown,
)

WEIGHTS = "params.npz"
CONFIG_2, WEIGHTS_2 = "config.json", "params.safetensors"
# The attention SAEs read the concatenated heads before the output projection, which is not the attention's output.
_SITES = {"res": "residual", "mlp": "mlp_out", "att": "blocks.{}.attn.hook_z"}
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-([\w-]+)")


def recognises(path: Path) -> bool:
    """A folder with params.npz."""
    return (path / WEIGHTS).is_file()


def recognises_2(path: Path) -> bool:
    """A folder with both files of Gemma Scope 2."""
    return (path / WEIGHTS_2).is_file() and (path / CONFIG_2).is_file()


def read(path: Path, given: Given) -> SAE:
    """ValueError for the transcoders, crosscoders and so on of the same collection, whose tensors look the same."""
    where = path.absolute().as_posix()
    repository, layer = _REPOSITORY.search(where), re.search(r"/layer_(\d+)(?:/|$)", where)
    model_name, site = None, None
    if "transcoder" in "/".join(path.absolute().parts[-4:]).lower():
        raise ValueError(f"{path} holds a transcoder, from one place of the model to another: take an SAE (res, mlp)")
    if repository:
        kind = re.match("(?:res|mlp|att)(?![a-z])", repository[3])
        if kind is None:
            raise ValueError(f"{path} is of {repository[0]}: SAEs of {', '.join(_SITES)} are read, no transcoders")
        site = _SITES[kind[0]].format(layer[1] if layer else "?")
        if "/embedding/" in f"{where}/":
            site = "hook_embed"
        model_name = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    return _build(
        "gemma-scope",
        path,
        WEIGHTS,
        read_npz(path / WEIGHTS),
        given,
        model_name,
        int(layer[1]) if layer else None,
        site,
    )


def read_2(path: Path, given: Given) -> SAE:
    """ValueError for the transcoders of the same collection, which map one site to another."""
    types = {"hf_hook_point_in": str, "affine_connection": bool, "model_name": str, "width": int}
    config = read_config(path / CONFIG_2, **{name: kind | None for name, kind in types.items()})
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{path} has the architecture {quoted(config['architecture'])}: jump_relu is expected")
    tensors = read_safetensors(path / WEIGHTS_2)
    layer, site = place_of_hook(config.get("hf_hook_point_in"))
    sae = _build("gemma-scope-2", path, WEIGHTS_2, tensors, given, config.get("model_name"), layer, site)
    return check_sizes(sae, path / CONFIG_2, {**config, "d_sae": config.get("width")})


def _build(
    format: str,
    path: Path,
    weights: str,
    tensors: Mapping[str, Tensor],
    given: Given,
    model_name: str | None,
    layer: int | None,
    site: str | None,
) -> SAE:
    """JumpReLU; b_dec is not subtracted from the input (arXiv 2408.05147)."""
    where = path / weights
    refuse_unknown(tensors, where, "w_enc", "W_enc", "w_dec", "W_dec", "b_enc", "b_dec", "threshold")
    return SAE(
        kind="jumprelu",
        W_enc_DF=pick(tensors, where, "w_enc", "W_enc"),
        b_enc_F=pick(tensors, where, "b_enc"),
        W_dec_FD=pick(tensors, where, "w_dec", "W_dec"),
        b_dec_D=pick(tensors, where, "b_dec"),
        threshold_F=pick(tensors, where, "threshold"),
        apply_b_dec_to_input=False,
        about=given.about(format, where, source=path, model_name=model_name, layer=layer, site=site),
    )
