"""Standard errors by the influence of every problem, simultaneous lower bounds, and the chance of being among the best.

The influence function is the derivative of the score in a problem's weight: its squares give what 1,000 bootstrap replicates give
(tested), without one. The bootstrap is run for what it alone tells: how often an expert is among the best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from expert_stats.evidence.estimates import Estimate

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
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, num - 1))
    bound_C = missing
    if np.isfinite(largest_R).all():
        normal = float(np.quantile(largest_R, LEVEL))
        # Signs have lighter tails than means of few problems over their own deviation: the t of the same level.
        bound_C = score_C - estimate.lowest(float(stats.t.isf(stats.norm.sf(normal), num - 1)), error_C)
    chosen = np.flatnonzero(supported_C & np.isfinite(score_C))
    if len(chosen):
        chance_TC[:, chosen] = _chances(estimate, chosen, rng)
    return Uncertainty(error_C, score_C - reach * error_C, score_C + reach * error_C, bound_C, chance_TC)


def draws_of(rng: np.random.Generator, number: int, num_problems: int) -> Array:
    """How often each problem is drawn, [R, P]."""
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), number).astype(np.float32)


def _chances(estimate: Estimate, cells: Array, rng: np.random.Generator) -> Array:
    draws_RP = draws_of(rng, REPLICATES, len(estimate.problems))
    score_RC = np.empty((REPLICATES, len(cells)), np.float32)
    for start in range(0, len(cells), _BLOCK):
        part = slice(start, start + _BLOCK)
        score_RC[:, part] = estimate.replicates(cells[part], draws_RP)
    order_RC = np.argsort(-np.nan_to_num(score_RC, nan=-np.inf), axis=1, kind="stable")[:, : max(TOPS)]
    return np.array([np.bincount(order_RC[:, :top].ravel(), minlength=len(cells)) / REPLICATES for top in TOPS])
