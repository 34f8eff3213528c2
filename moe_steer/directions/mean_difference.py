"""CAA: the difference of the two sides' means (Contrastive Activation Addition, arXiv 2312.06681)."""

from __future__ import annotations

from moe_steer.directions.contrast import Contrast
from moe_steer.directions.direction import Direction
from moe_steer.directions.finishing import finish


def caa(contrast: Contrast) -> Direction:
    """mean of the positive side - mean of the negative side, unscaled. ValueError for an empty side or equal means.

    With weight "sample" and pairs this is mean_i (mean_t h+ - mean_t h-), the released form of STA's CAA baseline.
    """
    return finish(contrast, contrast.difference_D, "caa", match_norm=False, options={})
