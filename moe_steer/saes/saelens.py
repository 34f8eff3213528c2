"""SAELens folders: cfg.json and sae_weights.safetensors, read in version 6 and older ones, written in version 6."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moe_steer.files import write_whole
from moe_steer.json_files import quoted
from moe_steer.saes.sae import SAE, fold_decoder_norm, hook_of_place, place_of_hook
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, refuse_unknown

CONFIG, WEIGHTS = SAELENS = ("cfg.json", "sae_weights.safetensors")
_KINDS = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}

_ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
_KEYS = {
    "W_enc_DF": "W_enc",
    "b_enc_F": "b_enc",
    "W_dec_FD": "W_dec",
    "b_dec_D": "b_dec",
    "threshold_F": "threshold",
    "r_mag_F": "r_mag",
    "b_mag_F": "b_mag",
}


def read_saelens(path: Path, given: Given) -> SAE:
    """ValueError for architectures and for normalisations that a file of weights alone cannot carry."""
    config = read_config(
        path / CONFIG,
        architecture=str,
        metadata=dict | None,
        apply_b_dec_to_input=bool,
        finetuning_scaling_factor=bool | None,
        rescale_acts_by_decoder_norm=bool | None,
        activation_fn_kwargs=dict | None,
        normalize_activations=str | bool | None,
    )
    weights_path = path / WEIGHTS
    tensors = read_safetensors(weights_path)
    architecture = _architecture(path, config)
    if architecture == "standard" and "threshold" in tensors:
        raise ValueError(
            f"{weights_path} holds thresholds, and {CONFIG} says {quoted(config.get('architecture', 'no architecture'))}: "
            'set "architecture" to "jumprelu" there if that is what it is'
        )
    if architecture not in _KINDS:
        raise ValueError(
            f"{path} holds a {quoted(architecture)} SAE: {', '.join(_KINDS)} are read; export a training checkpoint for inference first"
        )
    kind = _KINDS[architecture]
    _refuse_normalisation(path, config)
    own = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}.get(kind, ())
    finetuning = ("finetuning_scaling_factor", "scaling_factor")
    refuse_unknown(tensors, weights_path, "W_enc", _bias(kind), "W_dec", "b_dec", *own, *finetuning)
    bias = pick(tensors, weights_path, _bias(kind))
    encoder, decoder = pick(tensors, weights_path, "W_enc"), pick(tensors, weights_path, "W_dec")
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        encoder, bias, decoder = fold_decoder_norm(encoder, bias, decoder)
    finetuned = tensors.get("finetuning_scaling_factor", tensors.get("scaling_factor"))
    if finetuned is None and config.get("finetuning_scaling_factor"):
        raise ValueError(
            f"{path / CONFIG} has finetuning_scaling_factor set, and {WEIGHTS} has none: download both again"
        )
    if finetuned is not None and not torch.equal(finetuned, torch.ones_like(finetuned)):
        decoder = decoder * finetuned.to(decoder.dtype)[:, None]  # a factor applied to activations just before decoding
    hook = _metadata(path, config, "hook_name", "hook_point")
    layer, site = place_of_hook(hook)
    _refuse_other_layer(path, config, hook)
    sae = SAE(
        kind=kind,
        W_enc_DF=encoder,
        b_enc_F=bias,
        W_dec_FD=decoder,
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        threshold_F=pick(tensors, weights_path, "threshold") if kind == "jumprelu" else None,
        k=(given.k or _k(path, config)) if kind == "topk" else None,
        r_mag_F=pick(tensors, weights_path, "r_mag") if kind == "gated" else None,
        b_mag_F=pick(tensors, weights_path, "b_mag") if kind == "gated" else None,
        about=given.about(
            "saelens",
            weights_path,
            source=path,
            model_name=_metadata(path, config, "model_name"),
            layer=layer,
            site=site,
        ),
    )
    return check_sizes(sae, path / CONFIG, config)


def _bias(kind: str) -> str:
    return "b_gate" if kind == "gated" else "b_enc"


def _architecture(path: Path, config: dict[str, Any]) -> str:
    architecture = str(config.get("architecture", "standard"))
    activations = {str(config[key]) for key in ("activation_fn_str", "activation_fn", "activation") if config.get(key)}
    # Before version 6 a TopK SAE was a standard one with another activation function.
    if activations == {"topk"} and architecture in ("standard", "topk"):
        return "topk"
    if odd := activations - {"relu", architecture}:
        raise ValueError(
            f"{path / CONFIG} names the activation {quoted(min(odd))} of a {architecture} SAE: relu, jumprelu and topk are read"
        )
    return architecture


def _k(path: Path, config: dict[str, Any]) -> int:
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if type(k) is not int:
        raise ValueError(
            f"{path / CONFIG} gives k as {quoted(k)}: write the number of active atoms a token there (from Python: load_sae(k=...))"
        )
    return k


def _metadata(path: Path, config: dict[str, Any], *names: str) -> str | None:
    places = (config.get("metadata") or {}, config)
    found = [place[name] for place in places for name in names if place.get(name)]
    if any(type(value) is not str or value != found[0] for value in found):
        raise ValueError(
            f"{path / CONFIG} gives {names[0]} as {quoted(found[0] if len(found) == 1 else found)}: give one text"
        )
    return found[0] if found else None


def _refuse_other_layer(path: Path, config: dict[str, Any], hook: str | None) -> None:
    number = re.search(r"\d+", hook or "")
    for key in ("hook_layer", "hook_point_layer"):
        said = _number(config, key)
        if number and said is not None and said != int(number[0]):
            raise ValueError(
                f"{path / CONFIG} gives {key} as {said}, and the place as {hook}: take the one that is right"
            )


def _number(config: dict[str, Any], name: str) -> Any:
    return (config.get("metadata") or {}).get(name, config.get(name))


def _refuse_normalisation(path: Path, config: dict[str, Any]) -> None:
    for key, value in {**config, **(config.get("metadata") or {})}.items():
        scales = re.search("scaling_factor|norm_factor|input_scale|scale_factor", key) and "finetun" not in key
        if scales and value not in (None, False, 1):
            raise ValueError(f"{path / CONFIG} gives {key} as {quoted(value)}, which is not in the weights: fold it in")
    found = config.get("normalize_activations") or "none"
    if found is True or found == "expected_average_only_in":
        raise ValueError(
            f"{path} was trained on scaled activations (expected_average_only_in) and its scale is not in the files: fold it in with sae_lens and save the SAE again"
        )
    if found != "none":
        raise ValueError(
            f"{path} normalises every token by itself ({found}), which no weights can express: take an SAE without it"
        )


def save_sae(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write the folder and return it; ``load_sae`` reads back exactly the same numbers. A file appears complete or not at all."""
    target = Path(folder)
    keys = {**_KEYS, "b_enc_F": "b_gate"} if sae.kind == "gated" else _KEYS
    tensors = {keys[name]: tensor.detach().cpu().contiguous() for name, tensor in sae.tensors().items()}
    write_whole(target / WEIGHTS, save(tensors))
    write_whole(target / CONFIG, json.dumps(_config(sae), indent=2) + "\n")
    return target


def _config(sae: SAE) -> dict[str, Any]:
    metadata = {
        "sae_lens_version": "6.0.0",  # the version of the layout: without it the file would be read as an older one
        "model_name": sae.about.model_name,
        "hook_name": hook_of_place(sae.about.layer, sae.about.site),
    }
    return {
        "architecture": _ARCHITECTURES[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.width,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.kind == "topk" else {}),
        "metadata": metadata,
    }
