"""dictionary_learning (andyrdt's SAEs and others): trainer_*/config.json and ae.pt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_steer.json_files import check_types, quoted
from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_torch, refuse_unknown

CONFIG, WEIGHTS = "config.json", "ae.pt"
# A BatchTopK SAE is used with the threshold it learned, so it is read as JumpReLU (arXiv 2412.06410).
_KINDS = {
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "AutoEncoderTopK": "topk",
    "AutoEncoder": "relu",
}
_TENSORS = (
    *(f"{side}.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")),
    *("W_enc", "W_dec", "b_enc", "b_dec", "bias", "threshold", "k", "group_sizes"),
)
_TYPES = {
    "dict_class": str | None,
    "k": int | None,
    "layer": int | None,
    "lm_name": str | None,
    "submodule_name": str | None,
}
_SITES = {"resid_post": "residual", "mlp_out": "mlp_out", "attn_out": "attention_out"}


def recognises(path: Path) -> bool:
    """A folder with both files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """All of these subtract b_dec from their input. ValueError for the library's other dictionaries."""
    config = read_config(path / CONFIG, trainer=dict | None, buffer=dict | None)
    trainer = config.get("trainer") or {}
    check_types(trainer, f"{path / CONFIG}, trainer", _TYPES)
    weights_path = path / WEIGHTS
    dictionary = trainer.get("dict_class")
    if dictionary not in _KINDS:
        raise ValueError(f"{path} holds a {quoted(dictionary)}: {', '.join(_KINDS)} are read")
    kind = _KINDS[dictionary]
    if (side := (config.get("buffer") or {}).get("io", "out")) != "out":
        raise ValueError(
            f"{path} was trained on activations of the side {quoted(side)} of its module: 'out' is expected"
        )
    tensors = read_torch(weights_path)
    refuse_unknown(tensors, weights_path, *_TENSORS)
    bias = pick(tensors, weights_path, "encoder.bias", "b_enc")
    matrices = "W_enc" in tensors  # the Matryoshka class stores plain matrices, the others linear layers
    encoder = pick(tensors, weights_path, "W_enc") if matrices else pick(tensors, weights_path, "encoder.weight").T
    decoder = pick(tensors, weights_path, "W_dec") if matrices else pick(tensors, weights_path, "decoder.weight").T
    threshold_F = None
    if kind == "jumprelu":
        threshold_F = bias.new_zeros(len(bias)) + pick(tensors, weights_path, "threshold")
        if bool((threshold_F < 0).any()):  # the library's sign for a threshold that training has not measured yet
            raise ValueError(
                f"{weights_path} has a threshold below 0, as before it is learned: take a later checkpoint"
            )
    sae = SAE(
        kind=kind,
        W_enc_DF=encoder.contiguous(),
        b_enc_F=bias,
        W_dec_FD=decoder.contiguous(),
        b_dec_D=pick(tensors, weights_path, "b_dec", "bias"),
        threshold_F=threshold_F,
        k=(given.k or _k(tensors, trainer, path)) if kind == "topk" else None,
        apply_b_dec_to_input=True,
        about=given.about(
            "dictionary-learning",
            weights_path,
            source=path,
            model_name=trainer.get("lm_name"),
            layer=_layer(trainer, path),
            site=_site(trainer.get("submodule_name")),
        ),
    )
    return check_sizes(sae, path / CONFIG, trainer)


def _layer(trainer: Mapping[str, Any], path: Path) -> int | None:
    """The layer by its number and by the name of the module, such as resid_post_layer_11."""
    layer, named = trainer.get("layer"), re.search(r"layer_(\d+)", trainer.get("submodule_name") or "")
    if layer is None:
        return int(named[1]) if named else None
    if layer < 0 or (named and int(named[1]) != layer):
        raise ValueError(
            f"{path / CONFIG} gives layer as {layer}, and the module as {quoted(trainer.get('submodule_name'))}: "
            "take the one that is right"
        )
    return int(layer)


def _k(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], path: Path) -> int:
    k = tensors["k"].item() if "k" in tensors and tensors["k"].numel() == 1 else trainer.get("k")
    if type(k) is not int:
        raise ValueError(f"{path / CONFIG} gives k as {quoted(k)}: pass k, the number of active atoms a token")
    return k


def _site(submodule: str | None) -> str:
    # The library's example trains on the residual stream and then gives no submodule name.
    if not submodule:
        return "residual"
    return next((site for name, site in _SITES.items() if submodule.startswith(name)), submodule)
