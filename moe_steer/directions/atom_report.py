"""The atoms of a direction as a readable table, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from moe_steer.directions.atom_scores import density_F, effect_size_F
from moe_steer.directions.contrast import Contrast
from moe_steer.directions.direction import Direction

if TYPE_CHECKING:
    from moe_steer.saes.sae import SAE

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
