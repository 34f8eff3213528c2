"""``Contrast``: both sides of a contrast at one layer, and where they come from. And the last step of every method: norm, header,
``Direction``; atoms back to the residual stream.

Header keys: model, contrast (weight, samples, tokens, pairs left out, data hash), notes, residual_norm (mean norm of
the residual stream over the tokens of the contrast), norm, unscaled_norm, caa_norm, cosine_with_caa, norm_explained,
options, and with an SAE: sae, num_atoms, atoms (index and weight, the heaviest first, at most 10,000 of them).

CAA: the difference of the two sides' means (Contrastive Activation Addition, arXiv 2312.06681).
PCA: the axis along which two sides differ most, which need not be the difference of their means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_steer.direction import Direction
from moe_steer.directions.moments import Moments, PairMoments

if TYPE_CHECKING:
    from moe_steer.saes import SAE


HASH_MODULUS = 1 << 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """What two sides look like at the output of decoder layer ``layer``. Positive is the wanted side, everywhere.

    ``model``: a ``ModelShape`` as plain values. ``sae``: origin and width of the SAE whose atoms were measured.
    ``data``: sum of the sha256 of every sequence modulo 2^256, so that neither order nor shards matter.
    ``num_left_out``: pairs of which one side was empty. ``pairs``: second moments of the pairs' differences. ``notes``:
    free-form, copied into every direction's header. ValueError when a side is empty.
    """

    layer: int
    positive: Moments
    negative: Moments
    site: str = "residual"
    model: Mapping[str, Any] = field(default_factory=dict)
    sae: Mapping[str, Any] | None = None
    data: int = 0
    num_left_out: int = 0
    pairs: PairMoments | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def difference_D(self) -> Tensor:
        """Mean of the positive side - mean of the negative side, float64: the CAA vector (arXiv 2312.06681)."""
        for name, side in (("positive", self.positive), ("negative", self.negative)):
            if side.num_units == 0:
                raise ValueError(
                    f"the {name} side of the contrast at layer {self.layer} holds no token: give sequences that have some"
                )
        return self.positive.mean_D - self.negative.mean_D

    @property
    def difference_F(self) -> Tensor:
        """The same of every atom's activation ("amplitude" in STA, arXiv 2505.20322)."""
        return self.positive.mean_F - self.negative.mean_F

    @property
    def residual_norm(self) -> float:
        """Mean norm of the residual stream over the tokens of both sides."""
        num_tokens = self.positive.num_tokens + self.negative.num_tokens
        return (self.positive.norm_sum + self.negative.norm_sum) / num_tokens

    def check_sae(self, sae: SAE) -> None:
        """ValueError unless the atoms were measured with this SAE."""
        if self.sae is None:
            raise ValueError(
                f"the contrast at layer {self.layer} was collected without an SAE: collect it again with saes={{{self.layer}: sae}}"
            )
        mine, given = dict(self.sae), describe_sae(sae)
        if (mine["sha256"], mine["width"]) != (given["sha256"], given["width"]):
            raise ValueError(
                f"the contrast at layer {self.layer} was measured with the SAE {mine['source']}, not with {given['source']}: give that one"
            )

    def __add__(self, other: Contrast) -> Contrast:
        """Both together, as if collected in one pass. ValueError when they belong to different places."""
        for name in ("layer", "site", "model", "sae", "notes"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"contrasts with {name} {mine!r} and {theirs!r} cannot be added: collect both in the same way"
                )
        if (self.pairs is None) != (other.pairs is None):
            raise ValueError("one of two contrasts has no moments of pairs: collect both in the same way")
        return dataclasses.replace(
            self,
            positive=self.positive + other.positive,
            negative=self.negative + other.negative,
            data=(self.data + other.data) % HASH_MODULUS,
            num_left_out=self.num_left_out + other.num_left_out,
            pairs=None if self.pairs is None or other.pairs is None else self.pairs + other.pairs,
        )


def describe_sae(sae: SAE) -> dict[str, Any]:
    """Which SAE, as plain values."""
    return {**dataclasses.asdict(sae.about), "kind": sae.kind, "width": sae.width}


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


def caa(contrast: Contrast) -> Direction:
    """mean of the positive side - mean of the negative side, unscaled. ValueError for an empty side or equal means.

    With weight "sample" and pairs this is mean_i (mean_t h+ - mean_t h-), the released form of STA's CAA baseline.
    """
    return finish(contrast, contrast.difference_D, "caa", match_norm=False, options={})


def pca(contrast: Contrast, *, match_norm: bool = True) -> Direction:
    """First principal axis, pointing to the positive side, scaled to the CAA vector's norm.

    With pairs: of the pairs' differences, not centred (their common part is what is looked for; representation
    engineering, arXiv 2310.01405). Without: of all units about the middle between the two means. ValueError for a
    contrast that was collected without second moments.
    """
    if contrast.pairs is not None and contrast.pairs.num_pairs:
        second_DD, of = contrast.pairs.second_DD / contrast.pairs.num_pairs, "differences of pairs"
    elif contrast.positive.second_DD is not None and contrast.negative.second_DD is not None:
        second_DD, of = _about_the_middle(contrast), "units about the middle of the two means"
    else:
        raise ValueError(
            f"the contrast at layer {contrast.layer} has no second moments: collect it with second_moments=True"
        )
    values_D, axes_DD = torch.linalg.eigh(second_DD)
    axis_D = axes_DD[:, -1]
    if float(axis_D @ contrast.difference_D) < 0:
        axis_D = -axis_D
    share = float(values_D[-1] / values_D.clamp(min=0).sum())
    options = {"of": of, "share_of_variance": share}
    return finish(contrast, axis_D, "pca", match_norm=match_norm, options=options, any_length=True)


def _about_the_middle(contrast: Contrast) -> torch.Tensor:
    """Second moment about the middle m of the two means: sum (x - m)(x - m)^T / n over both sides."""
    sides = (contrast.positive, contrast.negative)
    middle_D = (sides[0].mean_D + sides[1].mean_D) / 2
    total_DD = torch.zeros_like(torch.outer(middle_D, middle_D))
    for side in sides:
        assert side.second_DD is not None
        cross_DD = torch.outer(side.sum_D, middle_D)
        total_DD += side.second_DD - cross_DD - cross_DD.T + side.num_units * torch.outer(middle_D, middle_D)
    return total_DD / sum(side.num_units for side in sides)
