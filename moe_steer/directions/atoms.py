"""The atoms of a direction as a readable table, in Markdown.

What tells the two sides of a contrast apart, atom by atom: amplitude, smoothed rates, effect size, density.
Two baselines of STA: all atoms of an SAE decoded, and one atom alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_steer.direction import Direction
from moe_steer.directions.methods import Contrast, decode_weights, finish
from moe_steer.directions.moments import Moments

if TYPE_CHECKING:
    from moe_steer.saes import SAE


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


def all_atoms(contrast: Contrast, sae: SAE, *, match_norm: bool = True) -> Direction:
    """The difference of mean activations times the decoder, without b_dec, scaled to the CAA vector's norm.

    Any distance to CAA is what the SAE does not represent. ValueError where no atom differs.
    """
    contrast.check_sae(sae)
    weights_F = contrast.difference_F
    vector_D = decode_weights(sae, weights_F)
    return finish(contrast, vector_D, "all_atoms", match_norm=match_norm, options={}, sae=sae, weights_F=weights_F)


def single_atom(contrast: Contrast, sae: SAE, atom: int | None = None, *, match_norm: bool = True) -> Direction:
    """The decoder row of one atom (the SAE baseline of AxBench, arXiv 2501.17148), scaled to the CAA vector's norm.

    Without ``atom``: the one whose activation is raised most on the positive side, by effect size where both sides have
    at least 2 samples, else by difference of means; the lower index of equals. A given atom that is weaker on the
    positive side points away from it: its row is taken with a minus sign. ValueError for an atom that does not exist,
    and where none is raised.
    """
    contrast.check_sae(sae)
    chosen_by = "given"
    if atom is None:
        known = min(contrast.positive.num_units, contrast.negative.num_units) >= 2
        chosen_by = "effect size" if known else "difference of means"
        score_F = effect_size_F(contrast) if known else contrast.difference_F
        atom = int(torch.sort(score_F, descending=True, stable=True).indices[0])
        if float(score_F[atom]) <= 0:
            raise ValueError(
                f"no atom is stronger on the positive side at layer {contrast.layer}: give atom=, or other sequences"
            )
    if not 0 <= atom < sae.width:
        raise ValueError(f"atom {atom} does not exist: this SAE has atoms 0-{sae.width - 1}")
    weights_F = torch.zeros(sae.width, dtype=torch.float64)
    weights_F[atom] = -1.0 if float(contrast.difference_F[atom]) < 0 else 1.0
    return finish(
        contrast,
        decode_weights(sae, weights_F),
        "single_atom",
        match_norm=match_norm,
        options={"atom": atom, "chosen_by": chosen_by},
        sae=sae,
        weights_F=weights_F,
        any_length=True,
    )


_COLUMNS = (
    "atom",
    "weight",
    "mean +",
    "mean -",
    "effect",
    "samples +",
    "samples -",
    "tokens +",
    "tokens -",
    "row norm",
    "cos CAA",
)


def report_atoms(
    direction: Direction, contrast: Contrast, sae: SAE, *, top: int = 20, labels: Mapping[int, str] | None = None
) -> str:
    """Markdown: what the direction is, in one paragraph, and a row for each of its ``top`` heaviest atoms.

    Columns: weight in the vector before scaling; mean activation on either side; effect size ("-" with fewer than 2
    units a side); share of samples and of tokens at which it fires; length of its decoder row and its cosine with the
    CAA vector. ``labels``: atom -> what it is known for. ValueError for a direction without atoms, or of another SAE.
    """
    contrast.check_sae(sae)
    atoms = direction.header.get("atoms")
    if not atoms:
        raise ValueError(
            f"the direction of method {direction.method!r} has no atoms: report one of sta, all_atoms or single_atom"
        )
    header = direction.header
    lines = [
        f"# {direction.method}, layer {direction.layer}",
        "",
        f"{header['num_atoms']} of {sae.width} atoms of {sae.about.source}; norm {direction.norm:.4g} "
        f"(before scaling {header['unscaled_norm']:.4g}, CAA {header['caa_norm']:.4g}, residual stream {header['residual_norm']:.4g}); "
        f"cosine with CAA {header['cosine_with_caa']:.3f}, share of |CAA|^2 explained {header['norm_explained']:.3f}; "
        f"{contrast.positive.num_samples} positive and {contrast.negative.num_samples} negative samples.",
        "",
        _row((*_COLUMNS, "label") if labels else _COLUMNS),
        _row(["---:"] * len(_COLUMNS) + (["---"] if labels else [])),
    ]
    for values, atom in _rows(contrast, sae, atoms[:top]):
        lines.append(_row([*values, (labels.get(atom, "") if labels else "")][: len(_COLUMNS) + bool(labels)]))
    dense = int((density_F(contrast)[torch.tensor([atom for atom, _ in atoms])] > 0.5).sum())
    if len(atoms) > top:
        lines += ["", f"{min(top, len(atoms))} of {header['num_atoms']} atoms are shown."]
    if dense:
        lines += [
            "",
            f"{dense} of the listed atoms fire at more than half of the tokens: max_density leaves such atoms out.",
        ]
    return "\n".join(lines) + "\n"


def _rows(contrast: Contrast, sae: SAE, atoms: list[tuple[int, float]]) -> list[tuple[list[str], int]]:
    positive, negative = contrast.positive, contrast.negative
    assert positive.atoms is not None
    assert negative.atoms is not None
    known = min(positive.num_units, negative.num_units) >= 2
    effect_F = effect_size_F(contrast) if known else None
    caa_D = contrast.difference_D / contrast.difference_D.norm()
    found = []
    for atom, weight in atoms:
        row_D = sae.W_dec_FD[atom].to("cpu", torch.float64)
        length = float(row_D.norm())
        values = [
            str(atom),
            f"{weight:.4g}",
            f"{float(positive.mean_F[atom]):.4g}",
            f"{float(negative.mean_F[atom]):.4g}",
            "-" if effect_F is None else f"{float(effect_F[atom]):.2f}",
            f"{int(positive.atoms.samples_fired_F[atom]) / positive.num_samples:.1%}",
            f"{int(negative.atoms.samples_fired_F[atom]) / negative.num_samples:.1%}",
            f"{int(positive.atoms.tokens_fired_F[atom]) / positive.num_tokens:.1%}",
            f"{int(negative.atoms.tokens_fired_F[atom]) / negative.num_tokens:.1%}",
            f"{length:.3g}",
            "-" if length == 0 else f"{float(row_D @ caa_D) / length:.3f}",
        ]
        found.append((values, atom))
    return found


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
