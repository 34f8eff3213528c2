"""How measures rank the same experts: rank correlations and overlaps of the best, with intervals over problems.

The problems are resampled once for all measures, each taking those that it has: what two measures share by having seen the same
problems moves both. Correlations: as `expert_stats.causes.over_problems.agreement` (random subsets without a quarter, on Fisher's
z). Overlaps: quantiles of a bootstrap. Both are of the rankings that so many problems give: their noise lowers an agreement, and what of it two
measures share raises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from expert_stats.evidence import Estimate, draws_of, jackknife_interval, kept_of, standardised

Array = np.ndarray[Any, Any]
Reach = tuple[float, float, float]
"""A value and the ends of its 95% interval."""
_REPLICATES = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Rankings:
    """Of N methods, over the C experts that all of them score."""

    methods: tuple[str, ...]
    cells: tuple[int, ...]
    """Layer by layer, expert by expert."""
    score_NC: Array
    top: int
    spearman: tuple[tuple[Reach, ...], ...]
    overlap: tuple[tuple[Reach, ...], ...]
    """Share of the best ``top`` in common."""

    @property
    def by_chance(self) -> float:
        """The overlap of two rankings that have nothing to do with each other."""
        return self.top / len(self.cells)

    @property
    def rank_NC(self) -> Array:
        """Ranks from 1, the best; ties in order of cells."""
        order_NC = np.argsort(-self.score_NC, axis=1, kind="stable")
        rank_NC = np.empty(order_NC.shape, np.int64)
        np.put_along_axis(rank_NC, order_NC, np.arange(1, len(self.cells) + 1)[None], axis=1)
        return rank_NC


def compare_rankings(estimates: Mapping[str, Estimate], top: int = 10) -> Rankings:
    """``estimates``: method -> what it scores by. ValueError for fewer than two methods, and for fewer than max(top, 4) experts
    that all of them score."""
    if len(estimates) < 2:
        raise ValueError(
            f"rankings by {', '.join(estimates) or 'no method'} cannot be compared: give files for two methods"
        )
    everything = slice(None)
    scored = [np.isfinite(one.score(everything)) & one.selected(everything) for one in estimates.values()]
    cells = np.flatnonzero(np.logical_and.reduce(scored))
    if len(cells) < max(top, 4):
        raise ValueError(
            f"only {len(cells)} experts are scored by all of {', '.join(estimates)}, and the best {top} are asked for: give more "
            "traces, or ask for fewer"
        )
    names = sorted({name for one in estimates.values() for name in one.problems})
    num, rng = len(names), np.random.default_rng(0)
    left_out = round(num / 4)
    kept_RP = kept_of(rng, _REPLICATES, num, left_out)
    drawn_RP = draws_of(rng, _REPLICATES, num)
    score_NC = np.array([one.score(everything)[cells] for one in estimates.values()])
    ranks, tops = [], []
    for one, score_C in zip(estimates.values(), score_NC, strict=True):
        columns = np.searchsorted(names, one.problems)
        ranks.append(standardised(_with_value(score_C, one.replicates(cells, kept_RP[:, columns]))))
        tops.append(_top(_with_value(score_C, one.replicates(cells, drawn_RP[:, columns])), top))
    least = min(len(one.problems) for one in estimates.values())
    spearman = _matrix(ranks, lambda a, b: _correlation((a * b).sum(1), len(cells), num, left_out, least))
    overlap = _matrix(tops, lambda a, b: _share((a & b).sum(1) / top))
    return Rankings(
        methods=tuple(estimates),
        cells=tuple(cells.tolist()),
        score_NC=score_NC,
        top=top,
        spearman=spearman,
        overlap=overlap,
    )


def _with_value(score_C: Array, replicate_RC: Array) -> Array:
    """The score itself before its replicates; a sample of problems may lack an expert, which then ranks last."""
    rows = np.concatenate([score_C[None], replicate_RC])
    return np.where(np.isfinite(rows), rows, np.nanmin(rows) - 1.0)


def _top(score_RC: Array, top: int) -> Array:
    best_RT = np.argsort(-score_RC, axis=1, kind="stable")[:, :top]
    top_RC = np.zeros(score_RC.shape, np.bool_)
    np.put_along_axis(top_RC, best_RT, True, axis=1)
    return top_RC


def _correlation(value_R: Array, num_cells: int, num: int, left_out: int, least: int) -> Reach:
    low, high = jackknife_interval(float(value_R[0]), value_R[1:], num_cells, num, left_out, least)
    return float(value_R[0]), low, high


def _share(value_R: Array) -> Reach:
    low, high = np.quantile(value_R[1:], [0.025, 0.975])
    return float(value_R[0]), float(low), float(high)


def _matrix(tables: list[Array], function: Any) -> tuple[tuple[Reach, ...], ...]:
    """Symmetric; 1 with itself."""
    size = len(tables)
    found = [[(1.0, 1.0, 1.0)] * size for _ in range(size)]
    for one in range(size):
        for other in range(one + 1, size):
            found[one][other] = found[other][one] = function(tables[one], tables[other])
    return tuple(map(tuple, found))
