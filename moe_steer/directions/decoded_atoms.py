"""Two baselines of STA: all atoms of an SAE decoded, and one atom alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_steer.directions.atom_scores import effect_size_F
from moe_steer.directions.contrast import Contrast
from moe_steer.directions.direction import Direction
from moe_steer.directions.finishing import decode_weights, finish

if TYPE_CHECKING:
    from moe_steer.saes.sae import SAE


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
