"""The file behind a residual entry of a plan: one vector, and a header that says what it was made for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from moe_steer.plan_entries import ResidualVector

HEADER_KEY = "direction"
"""Where a safetensors file's metadata keeps the header, as JSON."""
SITE = "residual"
"""The only site that a plan adds vectors at: the output of a decoder layer."""


class VectorFile(NamedTuple):
    """``vector_D`` float32; ``header``: JSON values, empty for a plain vector."""

    vector_D: Tensor
    header: Mapping[str, Any]


def read_vector(path: Path, entry: ResidualVector) -> VectorFile:
    """Read the vector of a plan's entry; ValueError when the file holds no finite vector, or one made for another place."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as reader:
            names = list(reader.keys())
            vector_D = reader.get_tensor("vector").float() if "vector" in names else None
            text = (reader.metadata() or {}).get(HEADER_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): make the direction again") from error
    if vector_D is None or vector_D.ndim != 1:
        raise ValueError(f"{path} holds {names}: a residual file needs one 1-D tensor named 'vector'")
    if not bool(torch.isfinite(vector_D).all()):
        raise ValueError(f"{path} holds NaN or infinite numbers: make the direction again")
    header = _header(path, text)
    layer, site = header.get("layer"), header.get("site")
    if layer is not None and layer != entry.layer:
        raise ValueError(
            f"{path} was made for layer {layer} and the plan adds it at layer {entry.layer}: name layer {layer} in the plan, or make a direction for layer {entry.layer}"
        )
    if site is not None and site != SITE:
        raise ValueError(
            f"{path} was made for site {site!r} and a plan adds vectors at site {SITE!r} (the output of a decoder layer): make the direction again at that site"
        )
    return VectorFile(vector_D, header)


def shift_of(path: Path, entry: ResidualVector) -> Tensor:
    """float64 [D]: what the entry adds to a token, its strength and unit counted in."""
    found = read_vector(path, entry)
    vector_D = found.vector_D.double()
    length = float(vector_D.norm())
    if length == 0.0:
        raise ValueError(f"{path} holds a vector of zeros, which has no direction: make the direction again")
    if entry.unit == "vector":
        return vector_D * entry.strength
    norm = found.header.get("residual_norm")
    if norm is None:
        raise ValueError(
            f"{path} has no residual_norm in its header, which unit 'residual_norm' needs: use unit 'vector', or make the direction with 'moe-steer direction'"
        )
    if not isinstance(norm, int | float) or isinstance(norm, bool) or not math.isfinite(norm) or norm <= 0:
        raise ValueError(
            f"{path} says residual_norm is {norm!r}, which is no length: use unit 'vector', or make the direction again"
        )
    return vector_D * (entry.strength * norm / length)


def _header(path: Path, text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} has a header that is not JSON ({error}): make the direction again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has the header {text[:40]!r}, which is no JSON object: make the direction again")
    return header
