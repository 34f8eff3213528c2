"""``load_sae``: reads an ``SAE`` from any published format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe_steer.saes.libraries import (
    DICTIONARY,
    SPARSIFY,
    is_torch_file,
    read_dictionary,
    read_linear_pair,
    read_sparsify,
)
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
from moe_steer.saes.sae import SAE
from moe_steer.saes.saelens import SAELENS, read_saelens
from moe_steer.saes.weights import Given


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
    return FORMATS[chosen].read(place, Given(layer=layer, site=site, k=k, model_name=model_name))


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
