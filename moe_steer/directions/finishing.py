"""The last step of every method: norm, header, ``Direction``. And atoms back to the residual stream.

Header keys: model, contrast (weight, samples, tokens, pairs left out, data hash), notes, residual_norm (mean norm of
the residual stream over the tokens of the contrast), norm, unscaled_norm, caa_norm, cosine_with_caa, norm_explained,
options, and with an SAE: sae, num_atoms, atoms (index and weight, the heaviest first, at most 10,000 of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_steer.directions.contrast import Contrast, describe_sae
from moe_steer.directions.direction import Direction

if TYPE_CHECKING:
    from moe_steer.saes.sae import SAE

MAX_LISTED = 10_000
_ROWS_PER_CHUNK = 4096


def finish(
    contrast: Contrast,
    vector_D: Tensor,
    method: str,
    *,
    match_norm: bool,
    options: Mapping[str, Any],
    sae: SAE | None = None,
    weights_F: Tensor | None = None,
    any_length: bool = False,
) -> Direction:
    """A direction from a vector in float64.

    ``match_norm``: scale it to the length of the CAA vector of the same contrast, as STA does. ``norm_explained`` is
    the share of |v_CAA|^2 that the unscaled vector leaves no rest of: 1 - |v_CAA - v|^2 / |v_CAA|^2 (negative for one
    that points elsewhere); with ``any_length``, for a vector whose own length means nothing, that of the best length:
    the squared cosine. ValueError when there is nothing to scale.
    """
    caa_D = contrast.difference_D
    caa_norm, norm = float(caa_D.norm()), float(vector_D.norm())
    if caa_norm == 0 or norm == 0:
        what = "both sides have the same mean" if caa_norm == 0 else f"the vector of {method} is 0"
        raise ValueError(f"no direction at layer {contrast.layer}: {what}; give other sequences, or keep more atoms")
    cosine = float(vector_D @ caa_D) / (norm * caa_norm)
    explained = cosine**2 if any_length else 1 - float((caa_D - vector_D).square().sum()) / caa_norm**2
    scaled_D = vector_D * (caa_norm / norm) if match_norm else vector_D
    header: dict[str, Any] = {
        "model": dict(contrast.model),
        "contrast": {
            "weight": contrast.positive.weight,
            "positive": {"samples": contrast.positive.num_samples, "tokens": contrast.positive.num_tokens},
            "negative": {"samples": contrast.negative.num_samples, "tokens": contrast.negative.num_tokens},
            "pairs_left_out": contrast.num_left_out,
            "data_sha256_sum": f"{contrast.data:064x}",
        },
        "notes": dict(contrast.notes),
        "residual_norm": contrast.residual_norm,
        "norm": float(scaled_D.norm()),
        "unscaled_norm": norm,
        "caa_norm": caa_norm,
        "cosine_with_caa": cosine,
        "norm_explained": explained,
        "options": {"match_norm": match_norm, **options},
    }
    if sae is not None and weights_F is not None:
        kept = torch.nonzero(weights_F).flatten()
        order = torch.sort(weights_F[kept].abs(), descending=True, stable=True).indices[:MAX_LISTED]
        atoms = [[int(atom), float(weights_F[atom])] for atom in kept[order]]
        header |= {"sae": describe_sae(sae), "num_atoms": len(kept), "atoms": atoms}
    return Direction(vector_D=scaled_D, layer=contrast.layer, site=contrast.site, method=method, header=header)


def decode_weights(sae: SAE, weights_F: Tensor) -> Tensor:
    """weights_F @ W_dec without b_dec, [D] in float64, over the atoms of non-zero weight and a few thousand rows at a
    time."""
    total_D = torch.zeros(sae.d_in, dtype=torch.float64)
    for atoms in torch.nonzero(weights_F).flatten().split(_ROWS_PER_CHUNK):
        rows_KD = sae.W_dec_FD[atoms.to(sae.device)].to("cpu", torch.float64)
        total_D += weights_F[atoms].double() @ rows_KD
    return total_D
