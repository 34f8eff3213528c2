"""``Contrast``: both sides of a contrast at one layer, and where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

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
