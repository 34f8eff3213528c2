"""What tells the two sides of a contrast apart, atom by atom: amplitude, smoothed rates, effect size, density."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_steer.directions.contrast import Contrast
from moe_steer.directions.moments import Moments

SMOOTHING = 0.5
"""Added to the times an atom fired and to the times it did not, so that 1 of 1 is no certainty (Jeffreys' prior)."""


def rate_F(side: Moments, per: str) -> Tensor:
    """(fired + 1/2) / (n + 1): how often every atom fires, of the side's tokens or samples."""
    assert side.atoms is not None
    fired_F, number = (
        (side.atoms.tokens_fired_F, side.num_tokens)
        if per == "token"
        else (side.atoms.samples_fired_F, side.num_samples)
    )
    return (fired_F.double() + SMOOTHING) / (number + 2 * SMOOTHING)


def rate_difference_F(contrast: Contrast, per: str) -> Tensor:
    """Smoothed rate on the positive side - on the negative side. A rate, since the sides differ in length and
    number."""
    return rate_F(contrast.positive, per) - rate_F(contrast.negative, per)


def effect_size_F(contrast: Contrast) -> Tensor:
    """Difference of means in units of the pooled standard deviation over units (Cohen's d), 0 for atoms that never
    fired.

    To every deviation the median one of the live atoms is added, so that an atom that hardly varies does not win by
    that alone (Tusher, Tibshirani and Chu 2001). ValueError with fewer than 2 units on a side, where nothing is known
    of the spread.
    """
    numbers = (contrast.positive.num_units, contrast.negative.num_units)
    if min(numbers) < 2:
        raise ValueError(
            f"the contrast at layer {contrast.layer} has {numbers[0]} positive and {numbers[1]} negative {contrast.positive.weight}s: an effect size needs 2 of each"
        )
    free = (numbers[0] - 1, numbers[1] - 1)
    pooled_F = (contrast.positive.variance_F * free[0] + contrast.negative.variance_F * free[1]) / sum(free)
    deviation_F = pooled_F.sqrt()
    live = density_F(contrast) > 0
    floor = float(deviation_F[live].median()) if bool(live.any()) else 0.0
    effect_F = contrast.difference_F / (deviation_F + floor)
    return torch.nan_to_num(effect_F, nan=0.0)  # 0 / 0: an atom that is silent, where nothing varies at all


def density_F(contrast: Contrast) -> Tensor:
    """Share of the tokens of both sides at which an atom fires."""
    sides = (contrast.positive, contrast.negative)
    fired_F = sum((side.atoms.tokens_fired_F for side in sides if side.atoms is not None), start=torch.zeros(()))
    return fired_F.double() / max(1, sum(side.num_tokens for side in sides))


def rank_of(score_F: Tensor) -> Tensor:
    """0 for the largest score; equal scores share the best place among them."""
    ordered_F, back_F = torch.unique(score_F, sorted=True, return_inverse=True)
    count_V = torch.bincount(back_F, minlength=len(ordered_F))
    larger_V = count_V.flip(0).cumsum(0).flip(0) - count_V
    return larger_V[back_F]
