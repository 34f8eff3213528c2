"""STA: Steering Target Atoms (arXiv 2505.20322). The atoms that tell the sides apart by amplitude and by frequency,
decoded.

STA's selection of atoms with the arithmetic of its authors' release (arXiv 2505.20322), ties and thresholds of 0
included.

Amplitude da = difference of the mean activations, frequency df = difference of the numbers of samples in which an atom
fired. An atom is kept where |score| reaches the k-th largest score, k = int(keep * F), counted from 0, by amplitude AND
by frequency.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.direction import Direction, DirectionWarning
from moe_steer.directions.atoms import density_F, effect_size_F, rank_of, rate_difference_F
from moe_steer.directions.methods import Contrast, decode_weights, finish

if TYPE_CHECKING:
    from moe_steer.saes import SAE


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


DEFAULT_KEEP = 0.35
"""Share of the atoms in the paper's safety experiments."""
Score = Callable[[Contrast, str], Tensor]


def _worse_rank(contrast: Contrast, per: str) -> Tensor:
    ranks = rank_of(contrast.difference_F.abs()), rank_of(rate_difference_F(contrast, per).abs())
    return -torch.maximum(*ranks).double()


SCORES: dict[str, Score] = {
    "both": _worse_rank,
    "amplitude": lambda contrast, per: contrast.difference_F.abs(),
    "frequency": lambda contrast, per: rate_difference_F(contrast, per).abs(),
    "effect": lambda contrast, per: effect_size_F(contrast).abs(),
}
"""What atoms are ordered by. "both": the worse of an atom's places by amplitude and by frequency, the released rule
made exact."""
_ABLATIONS = {"both": (True, True), "amplitude": (True, False), "frequency": (False, True)}


def sta(
    contrast: Contrast,
    sae: SAE,
    *,
    keep: float | None = None,
    trim: float | None = None,
    num_atoms: int | None = None,
    parity: bool = False,
    by: str = "both",
    sides: str = "two",
    rate: str = "token",
    max_density: float = 1.0,
    match_norm: bool = True,
) -> Direction:
    """The difference of mean activations on the kept atoms times their decoder rows (no b_dec), scaled to the CAA
    vector's norm.

    How many: ``keep``, the share of atoms kept (as the release means it; default 0.35), or ``trim``, the share dropped
    (as EasyEdit means it), or ``num_atoms``. ``by``: both, amplitude (ablation "only_act"), frequency ("only_freq"), or
    effect.

    ``parity``: the released arithmetic to the letter (``moe_steer.directions.target_atoms``): frequency in samples,
    thresholds with all their ties. A threshold of 0, at which a criterion keeps everything, is warned about. Otherwise
    exactly int(keep * F) or ``num_atoms`` atoms are kept, the best by score; equal scores are taken by larger
    |amplitude|, then by lower index. Only atoms that differ at all count, and with both or frequency only those that
    are stronger where they are more frequent; where there are fewer than asked for, they are all kept, with a warning.
    ``sides``: "one" keeps only atoms of the positive side. ``rate``: of tokens or of samples. ``max_density``: leaves
    out atoms that fire at a larger share of the tokens.

    ValueError for settings that do not go together and where nothing is kept.
    """
    contrast.check_sae(sae)
    share = _share(keep, trim, num_atoms)
    options: dict[str, Any] = {"parity": parity, "by": by}
    options |= {"num_atoms": num_atoms} if num_atoms is not None else {"keep": share, "trim": 1 - share}
    if parity:
        own = {"sides": sides != "two", "rate": rate != "token", "max_density": max_density != 1.0}
        if num_atoms is not None or by not in _ABLATIONS or any(own.values()):
            raise ValueError(
                f"parity=True goes with keep or trim and by {', '.join(_ABLATIONS)} alone: the release has no exact number, effect size, sides, rate or density"
            )
        kept_F = _released(contrast, share, by, options)
    else:
        _check_choices(by, sides, rate, max_density)
        options |= {"sides": sides, "rate": rate, "max_density": max_density}
        wanted = int(share * sae.width) if num_atoms is None else num_atoms
        kept_F = _exact(contrast, wanted, by, sides, rate, max_density)
    if not bool(kept_F.any()):
        raise ValueError(
            f"no atom is kept at layer {contrast.layer} with {options}: keep more, or give other sequences"
        )
    weights_F = torch.where(kept_F, contrast.difference_F, 0)
    options["num_kept"] = int(kept_F.sum())
    return finish(
        contrast,
        decode_weights(sae, weights_F),
        "sta",
        match_norm=match_norm,
        options=options,
        sae=sae,
        weights_F=weights_F,
    )


def _share(keep: float | None, trim: float | None, num_atoms: int | None) -> float:
    """The share kept. 1 - trim as the release computes it, rounding included: it decides the place of the threshold."""
    if sum(value is not None for value in (keep, trim, num_atoms)) > 1:
        raise ValueError(f"keep {keep}, trim {trim} and num_atoms {num_atoms} all say how many atoms: give one")
    for name, value in (("keep", keep), ("trim", trim)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: give a share from 0 to 1 (keep: kept, trim: dropped)")
    if num_atoms is not None and num_atoms < 1:
        raise ValueError(f"num_atoms is {num_atoms}: give at least 1")
    return keep if keep is not None else 1 - trim if trim is not None else DEFAULT_KEEP


def _released(contrast: Contrast, share: float, by: str, options: dict[str, Any]) -> Tensor:
    positive, negative = contrast.positive.atoms, contrast.negative.atoms
    assert positive is not None
    assert negative is not None
    if contrast.positive.weight != "sample" or contrast.positive.num_samples != contrast.negative.num_samples:
        raise ValueError(
            f"parity=True needs pairs and sample means, this contrast has {contrast.positive.num_samples} and {contrast.negative.num_samples} samples by {contrast.positive.weight}: collect pairs with weight='sample'"
        )
    frequency_F = (positive.samples_fired_F - negative.samples_fired_F).double()
    amplitude, frequency = _ABLATIONS[by]
    found: Released = select_released(
        contrast.difference_F, frequency_F, share, by_amplitude=amplitude, by_frequency=frequency
    )
    options |= {"amplitude_threshold": found.amplitude_threshold, "frequency_threshold": found.frequency_threshold}
    for name, threshold in (("amplitude", found.amplitude_threshold), ("frequency", found.frequency_threshold)):
        if threshold == 0:
            warnings.warn(
                f"the {name} threshold at layer {contrast.layer} is 0, so that criterion keeps every atom: lower keep, or leave parity off",
                DirectionWarning,
                stacklevel=3,
            )
    return found.kept_F


def _check_choices(by: str, sides: str, rate: str, max_density: float) -> None:
    for name, value, allowed in (
        ("by", by, tuple(SCORES)),
        ("sides", sides, ("one", "two")),
        ("rate", rate, ("token", "sample")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
    if not 0 < max_density <= 1:
        raise ValueError(f"max_density is {max_density}: give a share of the tokens above 0, up to 1")


def _exact(contrast: Contrast, wanted: int, by: str, sides: str, rate: str, max_density: float) -> Tensor:
    amplitude_F = contrast.difference_F
    allowed_F = (amplitude_F != 0) & (density_F(contrast) <= max_density)
    if by in ("both", "frequency"):
        allowed_F &= amplitude_F.sign() == rate_difference_F(contrast, rate).sign()
    if sides == "one":
        allowed_F &= amplitude_F > 0
    candidates = torch.nonzero(allowed_F).flatten()
    if len(candidates) < wanted:
        warnings.warn(
            f"{wanted} atoms were asked for and {len(candidates)} tell the sides apart at layer {contrast.layer}: all of these are kept",
            DirectionWarning,
            stacklevel=3,
        )
    order = torch.sort(amplitude_F[candidates].abs(), descending=True, stable=True).indices
    score_C = SCORES[by](contrast, rate)[candidates]
    order = order[torch.sort(score_C[order], descending=True, stable=True).indices]
    kept_F = torch.zeros_like(allowed_F)
    kept_F[candidates[order[:wanted]]] = True
    return kept_F
