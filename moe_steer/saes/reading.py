"""``load_sae``: reads an ``SAE`` from any published format.

Those of SAELens are in ``saelens``, the published collections in ``published``; here those of other training libraries:
dictionary_learning, sparsify, and two linear layers in a torch file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.json_files import check_types, quoted, short
from moe_steer.saes.published import (
    GEMMA,
    GEMMA_2,
    LLAMA,
    LLAMA_R1,
    is_qwen,
    qwen_layers,
    read_gemma,
    read_gemma_2,
    read_llama,
    read_llama_r1,
    read_qwen,
)
from moe_steer.saes.sae import SAE, place_of_hook
from moe_steer.saes.saelens import SAELENS, read_saelens
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, read_torch, refuse_unknown

DICTIONARY = ("config.json", "ae.pt")
# A BatchTopK SAE is used with the threshold it learned, so it is read as JumpReLU (arXiv 2412.06410).
_DICTIONARIES = {
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "AutoEncoderTopK": "topk",
    "AutoEncoder": "relu",
}
_DICTIONARY_TENSORS = (
    *(f"{side}.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")),
    *("W_enc", "W_dec", "b_enc", "b_dec", "bias", "threshold", "k", "group_sizes"),
)
_DICTIONARY_TYPES = {
    "dict_class": str | None,
    "k": int | None,
    "layer": int | None,
    "lm_name": str | None,
    "submodule_name": str | None,
}
_SITES = {"resid_post": "residual", "mlp_out": "mlp_out", "attn_out": "attention_out"}
SPARSIFY = ("cfg.json", "sae.safetensors")
_LAYER = re.compile(r"[-_]l(?:ayer)?[-_]?(\d+)(?=[-_.]|$)")


def read_dictionary(path: Path, given: Given) -> SAE:
    """dictionary_learning (andyrdt's SAEs and others), a folder trainer_*. All of these subtract b_dec from their input. ValueError for the library's other dictionaries."""
    config_path, weights_path = (path / name for name in DICTIONARY)
    config = read_config(config_path, trainer=dict | None, buffer=dict | None)
    trainer = config.get("trainer") or {}
    check_types(trainer, f"{config_path}, trainer", _DICTIONARY_TYPES)
    dictionary = trainer.get("dict_class")
    if dictionary not in _DICTIONARIES:
        raise ValueError(f"{path} holds a {quoted(dictionary)}: {', '.join(_DICTIONARIES)} are read")
    kind = _DICTIONARIES[dictionary]
    if (side := (config.get("buffer") or {}).get("io", "out")) != "out":
        raise ValueError(
            f"{path} was trained on activations of the side {quoted(side)} of its module: 'out' is expected"
        )
    tensors = read_torch(weights_path)
    refuse_unknown(tensors, weights_path, *_DICTIONARY_TENSORS)
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
        k=(given.k or _k(tensors, trainer, config_path)) if kind == "topk" else None,
        apply_b_dec_to_input=True,
        about=given.about(
            "dictionary-learning",
            weights_path,
            source=path,
            model_name=trainer.get("lm_name"),
            layer=_layer(trainer, config_path),
            site=_site(trainer.get("submodule_name")),
        ),
    )
    return check_sizes(sae, config_path, trainer)


def _layer(trainer: Mapping[str, Any], config_path: Path) -> int | None:
    """The layer by its number and by the name of the module, such as resid_post_layer_11."""
    layer, named = trainer.get("layer"), re.findall(r"layer_(\d+)", trainer.get("submodule_name") or "")
    if layer is None:
        return int(named[0]) if named else None
    if layer < 0:
        raise ValueError(f"{config_path} gives layer as {layer}: layers are counted from 0, correct it")
    if named and str(layer) not in named:
        raise ValueError(
            f"{config_path} gives layer as {layer}, and the module as {quoted(trainer['submodule_name'])}: correct the one that is wrong"
        )
    return int(layer)


def _k(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], config_path: Path) -> int:
    k = tensors["k"].item() if "k" in tensors and tensors["k"].numel() == 1 else trainer.get("k")
    if type(k) is not int:
        raise ValueError(f"{config_path} gives k as {quoted(k)}: pass k, the number of active atoms a token")
    return k


def _site(submodule: str | None) -> str:
    # The library's example trains on the residual stream and then gives no submodule name.
    if not submodule:
        return "residual"
    return next((site for name, site in _SITES.items() if submodule.startswith(name)), submodule)


def read_sparsify(path: Path, given: Given) -> SAE:
    """EleutherAI's sparsify, a folder named like the module it reads. TopK on x - b_dec; the rows of W_dec are atoms. ValueError for transcoders and for other activations."""
    config_path, weights_path = (path / name for name in SPARSIFY)
    config = read_config(config_path, transcode=bool | None, skip_connection=bool | None, signed=bool | None)
    if config.get("signed") or config.get("activation", "topk") != "topk":
        what = "signed set" if config.get("signed") else f"the activation {quoted(config['activation'])}"
        raise ValueError(f"{path} has {what}: TopK autoencoders without it are read")
    k = given.k or config.get("k")
    if type(k) is not int:
        raise ValueError(f"{config_path} gives k as {quoted(k)}: pass k, the number of active atoms a token")
    tensors = read_safetensors(weights_path)
    refuse_unknown(tensors, weights_path, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    layer, site = place_of_hook(path.absolute().name)
    run_config = path.absolute().parent / "config.json"
    model_name = read_config(run_config, model=str | None).get("model") if run_config.is_file() else None
    sae = SAE(
        kind="topk",
        W_enc_DF=pick(tensors, weights_path, "encoder.weight").T.contiguous(),
        b_enc_F=pick(tensors, weights_path, "encoder.bias"),
        W_dec_FD=pick(tensors, weights_path, "W_dec"),
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        k=k,
        apply_b_dec_to_input=True,
        about=given.about("sparsify", weights_path, source=path, model_name=model_name, layer=layer, site=site),
    )
    return check_sizes(sae, config_path, config)


def is_torch_file(path: Path) -> bool:
    """Any torch file: its content is checked when it is read."""
    return path.is_file() and path.suffix in (".pt", ".pth")


def read_linear_pair(path: Path, given: Given) -> SAE:
    """Goodfire (encoder_linear, decoder_linear) and qresearch (encoder, decoder). ReLU on the plain input, or TopK where ``k`` is given (Goodfire's SAEs of R1 have k 128)."""
    tensors = read_torch(path)
    pairs = (
        f"{side}{kind}.{part}"
        for side in ("encoder", "decoder")
        for kind in ("", "_linear")
        for part in ("weight", "bias")
    )
    refuse_unknown(tensors, path, *pairs)
    layer = _LAYER.search(path.name)
    return SAE(
        kind="relu" if given.k is None else "topk",
        W_enc_DF=pick(tensors, path, "encoder_linear.weight", "encoder.weight").T.contiguous(),
        b_enc_F=pick(tensors, path, "encoder_linear.bias", "encoder.bias"),
        W_dec_FD=pick(tensors, path, "decoder_linear.weight", "decoder.weight").T.contiguous(),
        b_dec_D=pick(tensors, path, "decoder_linear.bias", "decoder.bias"),
        k=given.k,
        apply_b_dec_to_input=False,
        about=given.about(
            "linear-pair", path, source=path, layer=int(layer[1]) if layer else None, site=given.site or "residual"
        ),
    )


class Format(NamedTuple):
    """A published format: how to recognise it, and how to read it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Given], SAE]


def _folder_with(names: tuple[str, ...]) -> Callable[[Path], bool]:
    return lambda path: all((path / name).is_file() for name in names)


# The order matters: Llama Scope R1 uses SAELens' file name, and any torch file may hold a pair of linear layers.
FORMATS = {
    "saelens": Format(_folder_with(SAELENS), read_saelens),
    "sparsify": Format(_folder_with(SPARSIFY), read_sparsify),
    "gemma-scope": Format(_folder_with(GEMMA), read_gemma),
    "gemma-scope-2": Format(_folder_with(GEMMA_2), read_gemma_2),
    "llama-scope": Format(_folder_with(LLAMA), read_llama),
    "llama-scope-r1": Format(_folder_with(LLAMA_R1), read_llama_r1),
    "dictionary-learning": Format(_folder_with(DICTIONARY), read_dictionary),
    "qwen-scope": Format(is_qwen, read_qwen),
    "linear-pair": Format(is_torch_file, read_linear_pair),
}


def load_sae(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    layer: int | None = None,
    site: str | None = None,
    k: int | None = None,
    model_name: str | None = None,
) -> SAE:
    """Read an SAE from the folder or file in which it was published, already on this disk.

    ``format``: a name of ``FORMATS``, or ``auto`` to recognise it by its files. ``layer`` and ``site`` (residual, mlp_out,
    attention_out) are for files that do not state them, and must not contradict those that do; ``k`` and ``model_name``
    override the files. Numbers stored in 16 bits are widened to float32. ValueError, in one line, when the files are not
    there, damaged, of no known format, or hold an SAE whose arithmetic cannot be expressed here.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"there is no SAE at {str(place)!r}: give the folder or file of a downloaded one")
    if format not in ("auto", *FORMATS):
        raise ValueError(f"SAE format {format!r} is unknown: choose auto, {', '.join(FORMATS)}")
    chosen = format if format != "auto" else _recognise(place)
    if not FORMATS[chosen].recognises(place) and FORMATS[chosen].recognises(place.parent):
        place = place.parent  # the path was a file of the folder
    try:
        return FORMATS[chosen].read(place, Given(layer=layer, site=site, k=k, model_name=model_name))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of torch, where scales are folded into tensors before the SAE checks its shapes
        raise ValueError(f"{place}: its tensors do not fit together ({short(error)}): check the format") from error


def layers_among(path: str | os.PathLike[str]) -> list[int]:
    """The layers of a folder that holds several SAEs (Qwen-Scope), from which ``load_sae`` needs a choice; otherwise empty."""
    layers = qwen_layers(Path(path))
    return layers if len(layers) > 1 else []


def _recognise(place: Path) -> str:
    for name, format in FORMATS.items():
        if format.recognises(place) or (place.is_file() and format.recognises(place.parent)):
            return name
    content = ", ".join(sorted(item.name for item in place.iterdir())[:6]) if place.is_dir() else place.name
    raise ValueError(
        f"{str(place)!r} is not an SAE of a known format (found: {content or 'nothing'}): give the folder of one layer, or name the format: {', '.join(FORMATS)}"
    )
