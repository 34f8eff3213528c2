"""How well an SAE fits the activations on which it will be used, and whether it may be used there at all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_steer.layers import ModelShape, model_shape
from moe_steer.saes.sae import SAE

POOR_FIT = 0.5
"""A warning is given if an SAE leaves more than this share of the variance unexplained."""
_NUMBERS_PER_CHUNK = 1 << 24  # activations held at once: 64 MB in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEFit:
    """The result of ``measure_fit``."""

    fraction_variance_unexplained: float
    """sum |x - decode(encode(x))|^2 / sum |x - mean|^2: 0 is perfect, 1 is as good as the mean alone."""
    l0: float
    """Mean number of active atoms a token."""
    dead_share: float
    """Share of the atoms that were active at no token."""
    num_tokens: int
    """Tokens measured."""

    def __str__(self) -> str:
        return (
            f"variance unexplained {self.fraction_variance_unexplained:.3f}, {self.l0:.1f} atoms a token, "
            f"{100 * self.dead_share:.1f}% of atoms dead, {self.num_tokens} tokens"
        )

    @property
    def warning(self) -> str:
        """A warning for readers of results from the SAE's atoms; empty for a good fit."""
        share = self.fraction_variance_unexplained
        if share <= POOR_FIT:
            return ""
        return f"the SAE leaves {share:.2f} of this model's variance unexplained: its atoms say little about the model"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@torch.no_grad()
def measure_fit(sae: SAE, batches: Iterable[Tensor]) -> SAEFit:
    """Fit over batches [T, D] of activations, in one pass: sums in float64, one chunk of [tokens, atoms] at a time.

    ValueError for no tokens at all, for numbers that are not finite, and for activations that do not vary.
    """
    num_tokens, num_active = 0, 0
    error, squares = 0.0, 0.0
    sum_D = torch.zeros(sae.d_in, dtype=torch.float64)
    shift_D: Tensor | None = None
    fired_F = torch.zeros(sae.width, dtype=torch.bool, device=sae.device)
    for batch_TD in batches:
        for x_TD in batch_TD.reshape(-1, batch_TD.shape[-1]).split(max(1, _NUMBERS_PER_CHUNK // sae.width)):
            acts_TF = sae.encode(x_TD)
            active_TF = acts_TF > 0
            num_active += int(active_TF.sum())
            fired_F |= active_TF.any(0)
            exact_TD = x_TD.to(device=sae.device, dtype=torch.float64)
            error += float((exact_TD - sae.decode(acts_TF)).square().sum())
            if shift_D is None:
                shift_D = exact_TD.mean(0)  # variance around a point near the mean: a large mean would cost digits
            moved_TD = exact_TD - shift_D
            squares += float(moved_TD.square().sum())
            sum_D += moved_TD.sum(0).cpu()
            num_tokens += len(x_TD)
    if num_tokens == 0:
        raise ValueError("there are no activations to measure the SAE on: give at least one token")
    variance = squares - float(sum_D.square().sum()) / num_tokens
    if not (variance > 0 and error < float("inf")):
        raise ValueError(
            f"the fit over {num_tokens} tokens is not a number (variance {variance}, error {error}): the activations do not vary or are not finite"
        )
    return SAEFit(
        fraction_variance_unexplained=error / variance,
        l0=num_active / num_tokens,
        dead_share=1 - int(fired_F.sum()) / sae.width,
        num_tokens=num_tokens,
    )


def fit_lines(layer: int, fit: SAEFit) -> list[str]:
    """Lines about an SAE's fit, shown before its atoms are used."""
    return [f"the SAE of layer {layer} on this model: {fit}", *([f"WARNING: {fit.warning}"] if fit.warning else [])]


def refuse_unexplained(fit: SAEFit, layer: int) -> None:
    """ValueError for an SAE that explains no more than the mean does: its atoms mean nothing, but results from them would
    look normal."""
    if fit.fraction_variance_unexplained >= 1:
        raise ValueError(
            f"the SAE of layer {layer} explains nothing of these tokens (the mean would do better; {fit}): it was made for another "
            "model, layer or scale; give one that was trained here ('moe-steer train-sae'), or only what needs no SAE, such as caa"
        )


def check_fits(sae: SAE, model_or_shape: Any, layer: int) -> None:
    """ValueError, in one line, when the SAE cannot belong to the residual stream at the output of ``layer`` of this model.

    ``model_or_shape``: a model, or its ``ModelShape``. Facts that the SAE's files do not state (None) are not checked.
    """
    shape = model_or_shape if isinstance(model_or_shape, ModelShape) else model_shape(model_or_shape)
    name = os.path.basename(shape.name.rstrip("/")) or shape.model_type
    check_layer(shape, layer)
    if sae.d_in != shape.hidden_size:
        raise ValueError(
            f"the SAE {sae.about.source} reads activations of width {sae.d_in}, {name} has width {shape.hidden_size}: it belongs to another model"
        )
    if sae.about.site not in (None, "residual"):
        raise ValueError(
            f"the SAE {sae.about.source} reads {sae.about.site}, not the residual stream after a layer: take a residual SAE"
        )
    if sae.about.layer not in (None, layer):
        raise ValueError(
            f"the SAE {sae.about.source} belongs to layer {sae.about.layer}, not to layer {layer}: take the SAE of that layer, or use it at its own"
        )


def check_layer(shape: ModelShape, layer: int) -> None:
    """ValueError for a layer that the model does not have."""
    if not 0 <= layer < shape.num_layers:
        raise ValueError(f"layer {layer} does not exist: {shape.model_type} has layers 0-{shape.num_layers - 1}")
