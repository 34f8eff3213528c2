"""Gemma Scope (Gemma 2): only params.npz; model, layer and site are in the download path."""

from __future__ import annotations

import re
from pathlib import Path

from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given, pick, read_npz, refuse_unknown

WEIGHTS = "params.npz"
# The attention SAEs read the concatenated heads before the output projection, which is not the attention's output.
_SITES = {"res": "residual", "mlp": "mlp_out", "att": "blocks.{}.attn.hook_z"}
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-([\w-]+)")


def recognises(path: Path) -> bool:
    """A folder with params.npz."""
    return (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """JumpReLU; b_dec is not subtracted from the input (arXiv 2408.05147)."""
    weights_path = path / WEIGHTS
    tensors = read_npz(weights_path)
    where = path.absolute().as_posix()
    repository, layer = _REPOSITORY.search(where), re.search(r"/layer_(\d+)(?:/|$)", where)
    model_name, site = None, None
    refuse_unknown(tensors, weights_path, "w_enc", "W_enc", "w_dec", "W_dec", "b_enc", "b_dec", "threshold")
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
    return SAE(
        kind="jumprelu",
        W_enc_DF=pick(tensors, weights_path, "w_enc", "W_enc"),
        b_enc_F=pick(tensors, weights_path, "b_enc"),
        W_dec_FD=pick(tensors, weights_path, "w_dec", "W_dec"),
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        threshold_F=pick(tensors, weights_path, "threshold"),
        apply_b_dec_to_input=False,
        about=given.about(
            "gemma-scope",
            weights_path,
            source=path,
            model_name=model_name,
            layer=int(layer[1]) if layer else None,
            site=site,
        ),
    )
