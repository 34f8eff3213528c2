"""PCA: the axis along which two sides differ most, which need not be the difference of their means."""

from __future__ import annotations

import torch

from moe_steer.directions.contrast import Contrast
from moe_steer.directions.direction import Direction
from moe_steer.directions.finishing import finish


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
