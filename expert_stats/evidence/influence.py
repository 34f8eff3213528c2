"""Standard errors by the influence of every problem, simultaneous lower bounds, and the chance of being among the best.

The influence function is the derivative of the score in a problem's weight: its squares give what 1,000 bootstrap replicates give
(tested), without one. The bootstrap is run for what it alone tells: how often an expert is among the best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from expert_stats.evidence.measure import Measure
from expert_stats.evidence.sums import ProblemSums

Array = np.ndarray[Any, Any]

TOPS = (1, 2, 5, 10)
REPLICATES, MULTIPLIERS = 1000, 999
_BLOCK = 512
LEVEL = 0.95


class Uncertainty(NamedTuple):
    """NaN where there are fewer than two problems or the score is undefined."""

    error_C: Array
    low_C: Array
    high_C: Array
    bound_C: Array
    """Lower bounds that hold together for all candidates, so for whichever is chosen."""
    chance_TC: Array
    """Share of bootstrap replicates in which the expert is among the best 1, 2, 5, 10 candidates; NaN for no candidate."""


def uncertainty_of(
    sums: ProblemSums, measure: Measure, candidates_C: Array, supported_C: Array, seed: int = 0
) -> Uncertainty:
    """``candidates_C``: cells over which the lower bounds hold; ``supported_C``: those that can be chosen."""
    totals = sums.rows(slice(None))
    score_C, num = measure.score(*totals), len(sums.problems)
    missing = np.full(score_C.shape, np.nan)
    chance_TC = np.full((len(TOPS), len(score_C)), np.nan)
    if num < 2:
        return Uncertainty(missing, missing, missing, missing, chance_TC)
    rng = np.random.default_rng(seed)
    signs_RP = rng.choice(np.array([-1.0, 1.0], np.float32), (MULTIPLIERS, num))
    largest_R = np.full(MULTIPLIERS, -np.inf)
    square_C = np.zeros(len(score_C))
    for start in range(0, len(score_C), _BLOCK):
        cells = slice(start, start + _BLOCK)
        influence_PC = influence_of(sums, measure, totals, cells)
        square_C[cells] = (influence_PC**2).sum(0)
        at = np.flatnonzero(candidates_C[cells] & (square_C[cells] > 0) & np.isfinite(square_C[cells]))
        if len(at):
            scaled_PC = (influence_PC[:, at] / np.sqrt(square_C[cells][at])).astype(np.float32)
            largest_R = np.maximum(largest_R, (signs_RP @ scaled_PC).max(1))
    error_C = np.sqrt(square_C * num / (num - 1) + measure.unseen_variance(*totals))
    error_C = np.where(np.isfinite(score_C), error_C, np.nan)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, num - 1))
    bound_C = missing
    if np.isfinite(largest_R).all():
        normal = float(np.quantile(largest_R, LEVEL))
        # Signs have lighter tails than means of few problems over their own deviation: the t of the same level.
        bound_C = score_C - float(stats.t.isf(stats.norm.sf(normal), num - 1)) * error_C
    chosen = np.flatnonzero(supported_C & np.isfinite(score_C))
    if len(chosen):
        chance_TC[:, chosen] = _chances(sums, measure, chosen, rng)
    return Uncertainty(error_C, score_C - reach * error_C, score_C + reach * error_C, bound_C, chance_TC)


def influence_of(
    sums: ProblemSums, measure: Measure, totals: tuple[Array, Array, Array, int], cells: Any = slice(None)
) -> Array:
    """[P, C]: what each problem adds to the score, to first order; a column adds up to 0."""
    joint_MC, expert_C, marker_M, total = totals
    slopes = measure.slopes(joint_MC[:, cells], expert_C[cells], marker_M, total)
    result = sums.expert_PC[:, cells] * slopes.expert_C
    result += np.multiply.outer(sums.total_P.astype(float), slopes.total_C)
    for index in np.flatnonzero((measure.weights_M != 0) & (marker_M > 0)).tolist():
        result += sums.joint_PMC[:, index, cells] * slopes.joint_MC[index]
        result += np.multiply.outer(sums.marker_PM[:, index].astype(float), slopes.marker_MC[index])
    return np.asarray(result)


def replicates_of(sums: ProblemSums, measure: Measure, cells: Array, weights_RP: Array) -> Array:
    """Scores [R, C] of the cells with every problem counted as often as its weight says."""
    used = np.flatnonzero(measure.weights_M).tolist()
    joint_RMC = np.zeros((len(weights_RP), len(measure.weights_M), len(cells)), np.float32)
    for index in used:
        joint_RMC[:, index] = weights_RP @ sums.joint_PMC[:, index][:, cells].astype(np.float32)
    expert_RC = weights_RP @ sums.expert_PC[:, cells].astype(np.float32)
    marker_RM, total_R = weights_RP @ sums.marker_PM, weights_RP @ sums.total_P
    return measure.score(joint_RMC, expert_RC, marker_RM, total_R)


def draws_of(rng: np.random.Generator, number: int, num_problems: int) -> Array:
    """How often each problem is drawn, [R, P]."""
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), number).astype(np.float32)


def _chances(sums: ProblemSums, measure: Measure, cells: Array, rng: np.random.Generator) -> Array:
    draws_RP = draws_of(rng, REPLICATES, len(sums.problems))
    score_RC = np.empty((REPLICATES, len(cells)), np.float32)
    for start in range(0, len(cells), _BLOCK):
        part = slice(start, start + _BLOCK)
        score_RC[:, part] = replicates_of(sums, measure, cells[part], draws_RP)
    order_RC = np.argsort(-np.nan_to_num(score_RC, nan=-np.inf), axis=1, kind="stable")[:, : max(TOPS)]
    return np.array([np.bincount(order_RC[:, :top].ravel(), minlength=len(cells)) / REPLICATES for top in TOPS])
