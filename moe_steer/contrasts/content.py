"""What problems are about, projected out of a contrast: the directions in which the model's states of different prompts differ most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_steer.contrasts.collect import collect_contrast
from moe_steer.contrasts.sequences import MarkedSequence
from moe_steer.directions import Contrast
from moe_steer.directions.moments import Moments, PairMoments


def prompt_states(
    model: Any, prompts: Sequence[Sequence[int]], layers: Sequence[int], batch_tokens: int | None = None
) -> dict[int, Tensor]:
    """Layer -> float64 [P, D]: of each prompt the mean residual stream over all its tokens, template included."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for number, prompt in enumerate(prompts):
        places = tuple(range(len(prompt)))
        item = MarkedSequence(f"prompt {number}", tuple(prompt), positive=places)
        for layer, one in collect_contrast(model, [item], layers, batch_tokens=batch_tokens).items():
            found[layer].append(one.positive.mean_D)
    return {layer: torch.stack(rows) for layer, rows in found.items()}


def content_subspace(states_PD: Tensor, rank: int) -> Tensor:
    """[rank, D] orthonormal: the first right singular vectors of the states less their mean over the prompts (arXiv 2604.02113,
    which takes rank 4). ValueError where the prompts differ in fewer directions."""
    centred_PD = states_PD.double() - states_PD.double().mean(0)
    _, values_N, axes_ND = torch.linalg.svd(centred_PD, full_matrices=False)
    there = int((values_N > 1e-9 * values_N.max()).sum()) if len(values_N) else 0
    if not 1 <= rank <= there:
        raise ValueError(
            f"the content of {len(states_PD)} prompts has {there} directions, and {rank} are to be projected out: give a rank from 1 to {there}, "
            "or traces of more problems"
        )
    return axes_ND[:rank]


def without_content(contrast: Contrast, axes_KD: Tensor) -> Contrast:
    """The contrast of the states h - V^T V h, V being ``axes_KD``: first and second moments as if they had been collected of these. The
    norm of the residual stream stays that of the states themselves. ValueError for a contrast with atoms, which are not linear in h.
    """
    if contrast.sae is not None:
        raise ValueError("atoms are no linear function of the states: project the content out of caa or pca alone")

    def vector(x_D: Tensor) -> Tensor:
        return x_D - axes_KD.T @ (axes_KD @ x_D)

    def matrix(x_DD: Tensor | None) -> Tensor | None:
        return None if x_DD is None else vector(vector(x_DD).T).T

    def side(one: Moments) -> Moments:
        return dataclasses.replace(one, sum_D=vector(one.sum_D), second_DD=matrix(one.second_DD))

    pairs = contrast.pairs
    if pairs is not None:
        second_DD = matrix(pairs.second_DD)
        assert second_DD is not None
        pairs = PairMoments(num_pairs=pairs.num_pairs, second_DD=second_DD)
    removed = float((axes_KD @ contrast.difference_D).norm() / contrast.difference_D.norm())
    notes: Mapping[str, Any] = {
        **contrast.notes,
        "content_projected": {"rank": len(axes_KD), "share_of_norm_removed": removed},
    }
    return dataclasses.replace(
        contrast, positive=side(contrast.positive), negative=side(contrast.negative), pairs=pairs, notes=notes
    )
