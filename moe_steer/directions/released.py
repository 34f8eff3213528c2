"""STA's selection of atoms with the arithmetic of its authors' release (arXiv 2505.20322), ties and thresholds of 0
included.

Amplitude da = difference of the mean activations, frequency df = difference of the numbers of samples in which an atom
fired. An atom is kept where |score| reaches the k-th largest score, k = int(keep * F), counted from 0, by amplitude AND
by frequency.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Released(NamedTuple):
    """``kept_F``: bool. The thresholds, None for a criterion that was not asked; at 0 that criterion keeps every
    atom."""

    kept_F: Tensor
    amplitude_threshold: float | None
    frequency_threshold: float | None


def select_released(
    amplitude_F: Tensor, frequency_F: Tensor, keep: float, *, by_amplitude: bool = True, by_frequency: bool = True
) -> Released:
    """The atoms that the release keeps. ``keep`` = 1 keeps all (the release itself stops with an index error there)."""
    kept_F = torch.ones_like(amplitude_F, dtype=torch.bool)
    thresholds: list[float | None] = [None, None]
    # Two-sided: an atom that is rarer and weaker on the positive side counts as much as a stronger, more frequent one.
    a_F, f_F = _signed_min_max(amplitude_F), _signed_min_max(frequency_F.to(amplitude_F.dtype))
    agreeing_F = ((a_F > 0) & (f_F > 0)) | ((a_F < 0) & (f_F < 0))
    scores = (amplitude_F.abs(), torch.where(agreeing_F, f_F, 0).abs())
    place = min(int(keep * len(amplitude_F)), len(amplitude_F) - 1)
    for number, (score_F, wanted) in enumerate(zip(scores, (by_amplitude, by_frequency), strict=True)):
        if wanted:
            threshold = torch.sort(score_F, descending=True).values[place]
            kept_F &= score_F >= threshold
            thresholds[number] = float(threshold)
    return Released(kept_F, thresholds[0], thresholds[1])


def _signed_min_max(values_F: Tensor) -> Tensor:
    """sign(x) (|x| - min|x|) / (max|x| - min|x|): the smallest become 0. Where all are alike the release divides 0 by
    0, and no comparison with the result holds: the same as 0 everywhere."""
    size_F = values_F.abs()
    low, high = size_F.min(), size_F.max()
    return torch.zeros_like(values_F) if low == high else values_F.sign() * (size_F - low) / (high - low)
