"""How far a score can be relied on: its error and bounds, and whether other problems say the same.

Standard errors are by the influence of every problem: the influence function is the derivative of the score in a problem's weight, and its
squares give what 1,000 bootstrap replicates give (tested), without one. The bootstrap is run for what it alone tells: how often an
expert is among the best. Other problems are halves of them, all but one family, and families against each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy

from expert_stats.evidence.estimates import Estimate, family_names

Array = np.ndarray[Any, Any]

TOPS = (1, 2, 5, 10)
REPLICATES, MULTIPLIERS = 1000, 999
_BLOCK = 512
LEVEL = 0.95
TOP = 10
LEAST_PROBLEMS = 5
"""Families of fewer problems are not compared."""
HALF_ROWS = (slice(0, None, 2), slice(1, None, 2))
"""Every other problem, and the rest."""
_REPLICATES = 200


class Uncertainty(NamedTuple):
    """NaN where there are fewer than two problems or the score is undefined."""

    error_C: Array
    low_C: Array
    high_C: Array
    bound_C: Array
    """Lower bounds that hold together for all candidates, so for whichever is chosen."""
    chance_TC: Array
    """Share of bootstrap replicates in which the expert is among the best 1, 2, 5, 10 candidates; NaN for no candidate."""


def uncertainty_of(estimate: Estimate, candidates_C: Array, supported_C: Array) -> Uncertainty:
    """``candidates_C``: cells over which the lower bounds hold; ``supported_C``: those that can be chosen."""
    score_C, num = estimate.score(slice(None)), len(estimate.problems)
    missing = np.full(score_C.shape, np.nan)
    chance_TC = np.full((len(TOPS), len(score_C)), np.nan)
    if num < 2:
        return Uncertainty(missing, missing, missing, missing, chance_TC)
    rng = np.random.default_rng(0)
    signs_RP = rng.choice(np.array([-1.0, 1.0], np.float32), (MULTIPLIERS, num))
    largest_R = np.full(MULTIPLIERS, -np.inf)
    square_C = np.zeros(len(score_C))
    for start in range(0, len(score_C), _BLOCK):
        cells = slice(start, start + _BLOCK)
        influence_PC = estimate.influence(cells)
        square_C[cells] = (influence_PC**2).sum(0)
        at = np.flatnonzero(candidates_C[cells] & (square_C[cells] > 0) & np.isfinite(square_C[cells]))
        if len(at):
            scaled_PC = (influence_PC[:, at] / np.sqrt(square_C[cells][at])).astype(np.float32)
            largest_R = np.maximum(largest_R, (signs_RP @ scaled_PC).max(1))
    error_C = np.sqrt(square_C * num / (num - 1) + estimate.unseen())
    error_C = np.where(np.isfinite(score_C), error_C, np.nan)
    reach = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, num - 1))
    bound_C = missing
    if np.isfinite(largest_R).all():
        normal = float(np.quantile(largest_R, LEVEL))
        # Signs have lighter tails than means of few problems over their own deviation: the t of the same level.
        bound_C = score_C - estimate.lowest(float(scipy.stats.t.isf(scipy.stats.norm.sf(normal), num - 1)), error_C)
    chosen = np.flatnonzero(supported_C & np.isfinite(score_C))
    if len(chosen):
        chance_TC[:, chosen] = _chances(estimate, chosen, rng)
    return Uncertainty(error_C, score_C - reach * error_C, score_C + reach * error_C, bound_C, chance_TC)


def draws_of(rng: np.random.Generator, number: int, num_problems: int) -> Array:
    """How often each problem is drawn, [R, P]."""
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), number).astype(np.float32)


def kept_of(rng: np.random.Generator, number: int, num_problems: int, left_out: int) -> Array:
    """1 for problems that are kept, 0 for those left out, [R, P]: subsets for `jackknife_interval`."""
    kept_RP = np.ones((number, num_problems), np.float32)
    for row in kept_RP:
        row[rng.permutation(num_problems)[:left_out]] = 0.0
    return kept_RP


def _chances(estimate: Estimate, cells: Array, rng: np.random.Generator) -> Array:
    draws_RP = draws_of(rng, REPLICATES, len(estimate.problems))
    score_RC = np.empty((REPLICATES, len(cells)), np.float32)
    for start in range(0, len(cells), _BLOCK):
        part = slice(start, start + _BLOCK)
        score_RC[:, part] = estimate.replicates(cells[part], draws_RP)
    order_RC = np.argsort(-np.nan_to_num(score_RC, nan=-np.inf), axis=1, kind="stable")[:, : max(TOPS)]
    return np.array([np.bincount(order_RC[:, :top].ravel(), minlength=len(cells)) / REPLICATES for top in TOPS])


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


def halves_of(estimate: Estimate) -> Halves:
    """Cells [C]."""
    scores, own = ([function(half) for half in HALF_ROWS] for function in (estimate.score, estimate.supported))
    return Halves(scores[0], scores[1], own[0], own[1])


def without_each_family(estimate: Estimate) -> tuple[Array, Array]:
    """The lowest score [C] and the largest p [C] that leaving one family of problems out gives; NaN with fewer than two."""
    names, cells = family_names(estimate.families), len(estimate.score(slice(None)))
    score_C, p_C = np.full(cells, np.nan), np.full(cells, np.nan)
    if len(names) < 2:
        return score_C, p_C
    for name in names:
        rows = np.array([family != name for family in estimate.families])
        score_C = np.fmin(score_C, estimate.score(rows))
        p_C = np.fmax(p_C, estimate.p_without(name))
    return score_C, p_C


def agreement_of_families(estimate: Estimate) -> dict[str, Any]:
    """Overlap of the best 10 (its interval: quantiles of a bootstrap) and Spearman correlation (`jackknife_interval`) of every two families,
    each [value, low, high] of 95% over problems. Both are of the rankings that so many problems give: more would agree better.

    Over the cells that any family supports by itself. Empty lists with fewer than two families of 5 problems.
    """
    names = family_names(estimate.families)
    rows_of = {name: np.flatnonzero([family == name for family in estimate.families]) for name in names}
    rows_of = {name: rows for name, rows in rows_of.items() if len(rows) >= LEAST_PROBLEMS}
    names = list(rows_of)
    found: dict[str, Any] = {"families": names, "problems": [len(rows) for rows in rows_of.values()], "top": TOP}
    if len(names) < 2:
        return found | {"families": [], "problems": [], "overlap": [], "spearman": []}
    support = np.zeros(len(estimate.score(slice(None))), np.bool_)
    for rows in rows_of.values():
        support |= estimate.supported(rows)
    for rows in rows_of.values():
        support &= estimate.selected(rows)  # a family that never selects an expert has no score for it
    cells, rng = np.flatnonzero(support), np.random.default_rng(0)
    ranks, tops, left_out = [], [], {}
    for name, rows in rows_of.items():
        left_out[name] = round(len(rows) / 4)
        weights_RP = np.zeros((2 * _REPLICATES + 1, len(estimate.problems)), np.float32)
        weights_RP[0, rows] = 1.0
        weights_RP[1 : _REPLICATES + 1, rows] = draws_of(rng, _REPLICATES, len(rows))
        weights_RP[_REPLICATES + 1 :, rows] = kept_of(rng, _REPLICATES, len(rows), left_out[name])
        # A sample of problems may lack an expert: it ranks last there.
        score_RC = np.nan_to_num(estimate.replicates(cells, weights_RP), nan=-2.0)
        ranks.append(standardised(np.concatenate([score_RC[:1], score_RC[_REPLICATES + 1 :]])))
        score_RC = score_RC[: _REPLICATES + 1]
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
            # Of two families of unlike sizes the one whose subsets vary less counts for both: too wide rather than too narrow.
            size, out = max(
                ((len(rows_of[name]), left_out[name]) for name in (names[one], names[other])),
                key=lambda pair: pair[0] / pair[1],
            )
            value_R, least = (ranks[one] * ranks[other]).sum(1), min(len(rows_of[names[at]]) for at in (one, other))
            ends = jackknife_interval(float(value_R[0]), value_R[1:], len(cells), size, out, least)
            spearman[one][other] = spearman[other][one] = _known(value_R[0], *((1.0, 1.0) if one == other else ends))
    return found | {"overlap": overlap, "spearman": spearman}


def standardised(score_RC: Array) -> Array:
    """Ranks of every row about their mean, with length 1: the inner product of two is Spearman's correlation; NaN without spread."""
    rank_RC = scipy.stats.rankdata(score_RC, axis=1) if score_RC.shape[1] > 2 else np.zeros(score_RC.shape)
    rank_RC = rank_RC - rank_RC.mean(1, keepdims=True) if rank_RC.size else rank_RC
    with np.errstate(invalid="ignore"):
        return np.asarray(rank_RC / np.sqrt((rank_RC**2).sum(1, keepdims=True)))


def _reach(value_R: Array) -> list[float | None]:
    """The first value, and the quantiles of the rest."""
    drawn = value_R[1:][np.isfinite(value_R[1:])]
    ends = np.quantile(drawn, [0.025, 0.975]).tolist() if len(drawn) else [float("nan")] * 2
    return _known(value_R[0], *ends)


def _known(*values: float) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def interval(value: Array, error: Array, num_problems: int) -> tuple[Array, Array]:
    """Two-sided 95% interval from Student's t with one degree of freedom less than problems."""
    reach = error * scipy.stats.t.ppf(0.975, max(num_problems - 1, 1))
    return value - reach, value + reach


def jackknife_interval(
    value: float, replicate_R: Array, num_cells: int, num_problems: int, left_out: int, degrees_of: int
) -> tuple[float, float]:
    """95% ends of a correlation, from its values without ``left_out`` of the problems (delete-d; see `expert_stats.causes`): a bootstrap adds
    the noise of the sample a second time, and covers what two families of 30 problems agree on in 0% to 85% of runs. NaN with fewer
    than four problems.
    ``degrees_of``: problems that the t quantile is for."""
    if min(num_problems, degrees_of) < 4 or not np.isfinite(value):
        return float("nan"), float("nan")
    error = np.nanstd(_fisher(replicate_R, num_cells), ddof=1) * np.sqrt((num_problems - left_out) / left_out)
    low, high = np.tanh(interval(_fisher(np.array(value), num_cells), np.array(error), degrees_of))
    return float(low), float(high)


def _fisher(value: Array, num_cells: int) -> Array:
    """Fisher's z. A correlation of 1 is taken for half a step less: two neighbours that change places cost 6 / (cells^3 - cells)."""
    most = 1 - 6.0 / max(num_cells**3 - num_cells, 12) / 2
    return np.asarray(np.arctanh(np.clip(value, -most, most)))


def rank_agreement(first: Array, second: Array) -> float:
    """Spearman correlation of two score tables over the cells that both define; NaN with fewer than three or without spread."""
    both = np.isfinite(first) & np.isfinite(second)
    a, b = first[both], second[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(a, b).statistic)


def top_overlap(first: Array, second: Array, size: int) -> float:
    """Share of the ``size`` best cells of one table among those of the other; NaN when a table has fewer."""
    tops = [_top(table.ravel(), size) for table in (first, second)]
    return len(tops[0] & tops[1]) / size if all(len(top) == size for top in tops) else float("nan")


def _top(table: Array, size: int) -> set[int]:
    defined = np.flatnonzero(np.isfinite(table))
    return set(defined[np.argsort(-table[defined], kind="stable")[:size]].tolist())
