"""``load_sae``: reads an ``SAE`` from any published format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from moe_steer.saes.formats import (
    dictionary_learning,
    gemma_scope,
    linear_pair,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given


class Format(NamedTuple):
    """A published format: how to recognise it, and how to read it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Given], SAE]


# The order matters: Llama Scope R1 uses SAELens' file name, and any torch file may hold a pair of linear layers.
FORMATS = {
    "saelens": Format(saelens.recognises, saelens.read),
    "sparsify": Format(sparsify.recognises, sparsify.read),
    "gemma-scope": Format(gemma_scope.recognises, gemma_scope.read),
    "gemma-scope-2": Format(gemma_scope.recognises_2, gemma_scope.read_2),
    "llama-scope": Format(llama_scope.recognises, llama_scope.read),
    "llama-scope-r1": Format(llama_scope.recognises_r1, llama_scope.read_r1),
    "dictionary-learning": Format(dictionary_learning.recognises, dictionary_learning.read),
    "qwen-scope": Format(qwen_scope.recognises, qwen_scope.read),
    "linear-pair": Format(linear_pair.recognises, linear_pair.read),
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
    return _finite(FORMATS[chosen].read(place, Given(layer=layer, site=site, k=k, model_name=model_name)))


def _finite(sae: SAE) -> SAE:
    """The SAE itself; ValueError for a number that is none. A threshold without a limit is that of an atom that never acts."""
    for name, tensor in sae.tensors().items():
        low, high = torch.aminmax(tensor)  # a mask would be as large as the matrix
        never_acts = name == "threshold_F" and high > 0
        if not (low.isfinite() and high.isfinite()) and not (never_acts and low > -torch.inf):
            raise ValueError(f"{sae.about.source}: {name} holds numbers that are not finite: download it again")
    return sae


def layers_among(path: str | os.PathLike[str]) -> list[int]:
    """The layers of a folder that holds several SAEs (Qwen-Scope), from which ``load_sae`` needs a choice; otherwise empty."""
    layers = qwen_scope.layers_in(Path(path))
    return layers if len(layers) > 1 else []


def _recognise(place: Path) -> str:
    for name, format in FORMATS.items():
        if format.recognises(place) or (place.is_file() and format.recognises(place.parent)):
            return name
    content = ", ".join(sorted(item.name for item in place.iterdir())[:6]) if place.is_dir() else place.name
    raise ValueError(
        f"{str(place)!r} is not an SAE of a known format (found: {content or 'nothing'}): give the folder of one layer, or name the format: {', '.join(FORMATS)}"
    )
