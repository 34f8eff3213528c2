"""Do other problems say the same? Halves of the problems, one family of problems left out, families against each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from expert_stats.evidence.influence import draws_of, replicates_of
from expert_stats.evidence.measure import Measure, supported_cells
from expert_stats.evidence.robust import robust_p
from expert_stats.evidence.sums import ProblemSums

Array = np.ndarray[Any, Any]

TOP = 10
LEAST_PROBLEMS = 5
"""Families of fewer problems are not compared."""
_REPLICATES = 200


class Halves(NamedTuple):
    """Scores from every other problem and from the rest, and the cells that each half supports by itself.

    Support must be judged within a half: cells that both halves together support are those where one half's low score went
    with the other's high one, and agree less than chance.
    """

    first: Array
    second: Array
    first_supported: Array
    second_supported: Array

    @property
    def stability(self) -> dict[str, float]:
        """Spearman correlation over all defined cells, and the shares of the best 2, 5, 10 of each half in common."""
        ranked = (
            np.where(own, half, np.nan)
            for half, own in ((self.first, self.first_supported), (self.second, self.second_supported))
        )
        one, other = tuple(ranked)
        overlaps = {f"top{size}_overlap": top_overlap(one, other, size) for size in (2, 5, 10)}
        return {"spearman": rank_agreement(self.first, self.second), **overlaps}


def halves_of(sums: ProblemSums, measure: Measure, min_support: int | None) -> Halves:
    """Cells [C]."""
    scores, own = [], []
    for start in (0, 1):
        totals = sums.rows(slice(start, None, 2))
        scores.append(measure.score(*totals))
        own.append(supported_cells(*totals, measure.weights_M, min_support))
    return Halves(scores[0], scores[1], own[0], own[1])


def without_each_family(sums: ProblemSums, measure: Measure, tested: list[int]) -> tuple[Array, Array, list[str]]:
    """The lowest score [C] and the largest p [C] that leaving one family of problems out gives; NaN with fewer than two.

    ``tested``: markers whose robust test counts; the p of a cell is the smallest of them.
    """
    names, cells = sums.family_names(), sums.expert_PC.shape[1]
    score_C, p_C = np.full(cells, np.nan), np.full(cells, np.nan)
    if len(names) < 2:
        return score_C, p_C, names
    for name in names:
        rows = np.array([family != name for family in sums.families])
        score_C = np.fmin(score_C, measure.score(*sums.rows(rows)))
        own_C = np.full(cells, np.nan)
        for marker in tested:
            own_C = np.fmin(own_C, robust_p(sums.excess_of(marker, without=name), cells)[1])
        p_C = np.fmax(p_C, own_C)
    return score_C, p_C, names


def agreement_of_families(
    sums: ProblemSums, measure: Measure, min_support: int | None, seed: int = 0
) -> dict[str, Any]:
    """Overlap of the best 10 and Spearman correlation of every two families, each [value, low, high] (95%, bootstrap over problems).

    Over the cells that any family supports by itself. Empty lists with fewer than two families of 5 problems.
    """
    rows_of = {name: np.flatnonzero([family == name for family in sums.families]) for name in sums.family_names()}
    rows_of = {name: rows for name, rows in rows_of.items() if len(rows) >= LEAST_PROBLEMS}
    names = list(rows_of)
    found: dict[str, Any] = {"families": names, "problems": [len(rows) for rows in rows_of.values()], "top": TOP}
    if len(names) < 2:
        return found | {"families": [], "problems": [], "overlap": [], "spearman": []}
    support = np.zeros(sums.expert_PC.shape[1], np.bool_)
    for rows in rows_of.values():
        support |= supported_cells(*sums.rows(rows), measure.weights_M, min_support)
    for rows in rows_of.values():
        support &= sums.expert_PC[rows].any(axis=0)  # a family that never selects an expert has no score for it
    cells, rng = np.flatnonzero(support), np.random.default_rng(seed)
    ranks, tops = [], []
    for rows in rows_of.values():
        weights_RP = np.zeros((_REPLICATES + 1, len(sums.problems)), np.float32)
        weights_RP[0, rows] = 1.0
        weights_RP[1:, rows] = draws_of(rng, _REPLICATES, len(rows))
        # A sample of problems may lack an expert: it ranks last there.
        score_RC = np.nan_to_num(replicates_of(sums, measure, cells, weights_RP), nan=-2.0)
        ranks.append(_standardised(score_RC))
        best_RT = np.argsort(-score_RC, axis=1, kind="stable")[:, :TOP]
        top_RC = np.zeros(score_RC.shape, np.bool_)
        np.put_along_axis(top_RC, best_RT, True, axis=1)
        tops.append(top_RC)
    enough = len(cells) >= TOP
    overlap: list[list[list[float | None]]] = [[[] for _ in names] for _ in names]
    spearman: list[list[list[float | None]]] = [[[] for _ in names] for _ in names]
    for one in range(len(names)):
        for other in range(one, len(names)):
            shared_R = (tops[one] & tops[other]).sum(1) / TOP if enough else np.full(_REPLICATES + 1, np.nan)
            overlap[one][other] = overlap[other][one] = _reach(shared_R)
            spearman[one][other] = spearman[other][one] = _reach((ranks[one] * ranks[other]).sum(1))
    return found | {"overlap": overlap, "spearman": spearman}


def _standardised(score_RC: Array) -> Array:
    """Ranks of every row about their mean, with length 1: the inner product of two is Spearman's correlation; NaN without spread."""
    rank_RC = stats.rankdata(score_RC, axis=1) if score_RC.shape[1] > 2 else np.zeros(score_RC.shape)
    rank_RC = rank_RC - rank_RC.mean(1, keepdims=True) if rank_RC.size else rank_RC
    with np.errstate(invalid="ignore"):
        return np.asarray(rank_RC / np.sqrt((rank_RC**2).sum(1, keepdims=True)))


def _reach(value_R: Array) -> list[float | None]:
    """The first value, and the quantiles of the rest."""
    drawn = value_R[1:][np.isfinite(value_R[1:])]
    ends = np.quantile(drawn, [0.025, 0.975]).tolist() if len(drawn) else [float("nan")] * 2
    return [float(value) if np.isfinite(value) else None for value in (value_R[0], *ends)]


def rank_agreement(first: Array, second: Array) -> float:
    """Spearman correlation of two score tables over the cells that both define; NaN with fewer than three or without spread."""
    both = np.isfinite(first) & np.isfinite(second)
    a, b = first[both], second[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def top_overlap(first: Array, second: Array, size: int) -> float:
    """Share of the ``size`` best cells of one table among those of the other; NaN when a table has fewer."""
    tops = [_top(table.ravel(), size) for table in (first, second)]
    return len(tops[0] & tops[1]) / size if all(len(top) == size for top in tops) else float("nan")


def _top(table: Array, size: int) -> set[int]:
    defined = np.flatnonzero(np.isfinite(table))
    return set(defined[np.argsort(-table[defined], kind="stable")[:size]].tolist())
