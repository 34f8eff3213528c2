"""Contrasts made of given activations, and the released formulae of STA written down a second time, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_steer.directions import Accumulator, Contrast
from moe_steer.directions.methods import describe_sae
from moe_steer.saes import SAE
from moe_steer.saes.sae import SAEAbout


def plain_sae(width: int, seed: int = 0, *, layer: int = 3, d_in: int | None = None) -> SAE:
    """ReLU, float64. Without ``d_in`` atom j is entry j of the input, so that activations can be given by hand."""
    generator = torch.Generator().manual_seed(seed)
    size = d_in or width
    encoder = torch.eye(width, dtype=torch.float64)
    if d_in:
        encoder = torch.randn(size, width, generator=generator, dtype=torch.float64) / size**0.5
    return SAE(
        kind="relu",
        W_enc_DF=encoder,
        b_enc_F=torch.full((width,), -0.3 if d_in else 0.0, dtype=torch.float64),
        W_dec_FD=torch.randn(width, size, generator=generator, dtype=torch.float64),
        b_dec_D=torch.randn(size, generator=generator, dtype=torch.float64),
        apply_b_dec_to_input=False,
        about=SAEAbout(
            format="trained", source=f"made with seed {seed}", sha256=str(seed), layer=layer, site="residual"
        ),
    )


def contrast_of(
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    sae: SAE | None = None,
    *,
    weight: str = "sample",
    second: bool = False,
) -> Contrast:
    """A contrast of samples [T, D] a side, at layer 3."""
    sides = []
    for samples in (positive, negative):
        side = Accumulator(samples[0].shape[1], weight=weight, sae=sae, second=second)
        for x_TD in samples:
            side.add(x_TD, [len(x_TD)])
        sides.append(side.moments())
    about = describe_sae(sae) if sae is not None else None
    return Contrast(layer=3, positive=sides[0], negative=sides[1], sae=about)


def random_sides(seed: int, width: int, number: int, *, steps: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """Samples of 1, 2 or 4 tokens whose entries are eighths, often 0 or below: means are exact, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for side in sides:
        for _ in range(number):
            size = (1, 2, 4)[int(torch.randint(3, (1,), generator=generator))]
            side.append(torch.randint(-steps, steps, (size, width), generator=generator).double() / 8)
    return sides


def released(
    positive_NF: Any, negative_NF: Any, decoder_FD: Any, caa_D: Any, pec: float, mode: str
) -> tuple[list[int], Any, Any]:
    """(kept atoms, v, v scaled to the CAA norm) from the samples' mean activations, following the release step by step.

    0 / 0 is NaN there, and every comparison with NaN is false.
    """
    num_samples, width = positive_NF.shape
    amplitude = [sum(positive_NF[:, j] - negative_NF[:, j]) / num_samples for j in range(width)]
    frequency = [float(sum(positive_NF[:, j] > 0)) - float(sum(negative_NF[:, j] > 0)) for j in range(width)]

    def normed(values: list[float]) -> list[float]:
        sizes = [abs(value) for value in values]
        spread = max(sizes) - min(sizes)
        return [
            math.nan if spread == 0 else math.copysign(1, value) * (value != 0) * (size - min(sizes)) / spread
            for value, size in zip(values, sizes, strict=True)
        ]

    a, f = normed(amplitude), normed(frequency)
    scores = [f[j] if (a[j] > 0 and f[j] > 0) or (a[j] < 0 and f[j] < 0) else 0.0 for j in range(width)]
    place = int(pec * width)
    frequency_threshold = sorted((abs(score) for score in scores), reverse=True)[place]
    amplitude_threshold = sorted((abs(value) for value in amplitude), reverse=True)[place]
    kept = [
        j
        for j in range(width)
        if (mode == "only_act" or abs(scores[j]) >= frequency_threshold)
        and (mode == "only_freq" or abs(amplitude[j]) >= amplitude_threshold)
    ]
    vector = np.zeros(decoder_FD.shape[1])
    for j in kept:
        vector = vector + amplitude[j] * decoder_FD[j]
    norm = math.sqrt(sum(value * value for value in vector))
    scaled = vector * (math.sqrt(sum(value * value for value in caa_D)) / norm) if norm else vector * math.nan
    return kept, vector, scaled
