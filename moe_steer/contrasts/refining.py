"""What is left out of a contrast, both after arXiv 2604.02113: decision sites that are no decisions, and what the problems are about.

A site is a decision where the model does the same again when it goes on from there anew. Most places before a switch word are none:
re-generated from the same prefix, 93.3% of 541 boundaries did not show the behaviour in 8 of 10 samples. What problems are about: the
directions in which the model's states of different prompts differ most, projected out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_steer.contrasts.collect import collect_contrast
from moe_steer.contrasts.sequences import MarkedSequence
from moe_steer.contrasts.sites import before_lead, token_text
from moe_steer.directions import Contrast
from moe_steer.directions.moments import Moments, PairMoments
from moe_steer.thinking import THOUGHT, TokenTags
from moe_steer.tokens import MarkerSet

STOP, SWITCH = "stop", "switch"
Site = tuple[str, int]
"""A sequence's name, and a position in it."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How many sites of one side came back. ``share``: of the samples at a site, at least so many show the behaviour again."""

    side: str
    sites: int
    kept: int
    samples: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def line(self) -> str:
        """In words."""
        what = "stops" if self.side == STOP else "switches"
        return (
            f"{self.kept} of {self.sites} {what} ({100 * self.kept / max(1, self.sites):.1f}%) come back in at least {100 * self.share:g}% of "
            f"{self.samples} re-generations; the others are left out"
        )


def sites_of(sequences: Sequence[MarkedSequence]) -> list[Site]:
    """Every marked position."""
    return [(item.name, place) for item in sequences for place in (*item.positive, *item.negative)]


def stable_sites(
    sequences: Sequence[MarkedSequence],
    returned: Callable[[Site], Sequence[bool]],
    share: float,
) -> tuple[list[MarkedSequence], list[Stability]]:
    """The sequences with the stable sites alone, without those that have none left, and the numbers of both sides.

    ``returned``: of each re-generation of a site, whether its behaviour came back. ValueError for a share outside 0..1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of re-generations is {share:g}: give one above 0, up to 1")
    kept, counted = [], {STOP: [0, 0], SWITCH: [0, 0]}
    samples = 0
    for item in sequences:
        left = {}
        for side, places in ((STOP, item.positive), (SWITCH, item.negative)):
            back = {place: list(returned((item.name, place))) for place in places}
            samples = max([samples, *map(len, back.values())])
            left[side] = tuple(place for place, shown in back.items() if sum(shown) >= share * len(shown) - 1e-9)
            counted[side][0] += len(places)
            counted[side][1] += len(left[side])
        if any(left.values()):
            kept.append(dataclasses.replace(item, positive=left[STOP], negative=left[SWITCH]))
    numbers = [
        Stability(side=side, sites=sites, kept=stable, samples=samples, share=share)
        for side, (sites, stable) in counted.items()
    ]
    return kept, numbers


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Whether a continuation does what the trace did behind a site: the thought is closed there, or a step begins with a switch word.

    Blanks may stand between. A switch is recognised as ``decision_sites`` does, words that lead up to it included.
    """

    tags: TokenTags
    markers: MarkerSet
    texts: Callable[[int], str]

    @classmethod
    def of(cls, tokenizer: Any, tags: TokenTags, switch_words: Sequence[str]) -> Behaviour:
        """Under a tokenizer."""
        texts = functools.cache(functools.partial(token_text, tokenizer))
        return cls(tags=tags, markers=MarkerSet.from_tokenizer(tokenizer, tuple(switch_words)), texts=texts)

    def returns(self, prefix: Sequence[int], continuation: Sequence[int], stops: bool) -> bool:
        """``prefix``: the tokens up to the site, its own included."""
        ids = (*prefix, *continuation)
        place = len(prefix)
        while place < len(ids) and not self._closes(ids, place) and not self.texts(ids[place]).strip():
            place += 1
        if stops:
            return self._closes(ids, place)
        spans = [span for group in self.markers.find_occurrences(ids).values() for span in group]
        starts = {before_lead(ids, span.start - 1, self.texts) + 1 for span in spans if span.start >= place}
        return place in starts

    def _closes(self, ids: Sequence[int], place: int) -> bool:
        found = self.tags.at(ids, place) if place < len(ids) else None
        return found is not None and found[1] != THOUGHT


def shown_by(
    sequences: Sequence[MarkedSequence], behaviour: Behaviour, continuations: Mapping[Site, Sequence[Sequence[int]]]
) -> Callable[[Site], list[bool]]:
    """What ``stable_sites`` asks, from the continuations of every site."""
    by_name = {item.name: item for item in sequences}

    def returned(site: Site) -> list[bool]:
        item, place = by_name[site[0]], site[1]
        prefix, stops = item.token_ids[: place + 1], place in item.positive
        return [behaviour.returns(prefix, continuation, stops) for continuation in continuations[site]]

    return returned


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
