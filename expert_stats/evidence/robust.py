"""A test of association that problem kinds and drift do not fool: the excess over a trace's own bins, against its spread over
problems.

With nothing associated inside any thought, harder problems have more of a marker and other experts, and both drift with the
position; a test that pools all tokens then finds experts in every run (40 of 40 simulated; here none, tests/bench/evidence.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from expert_stats.evidence.sums import Excess

Array = np.ndarray[Any, Any]


def robust_p(excess: Excess | None, num_cells: int) -> tuple[Array, Array]:
    """z [C] and its one-sided p [C]: the summed excess over its standard deviation, Student's t with one degree less than problems.

    The deviation is the larger of the problems' own and that of drawing tokens within bins: an expert that is nearly always or
    never on can show no spread by luck. NaN with fewer than two problems, or where neither varies.
    """
    if excess is None or excess.num < 2:
        return np.full(num_cells, np.nan), np.full(num_cells, np.nan)
    num = excess.num
    between_C = np.maximum(excess.square_C - excess.sum_C**2 / num, 0.0) * num / (num - 1)
    spread_C = np.sqrt(np.maximum(between_C, excess.variance_C))
    with np.errstate(divide="ignore", invalid="ignore"):
        z_C = np.where(spread_C > 1e-9, excess.sum_C / spread_C, np.nan)
    return z_C, stats.t.sf(z_C, num - 1)


def false_discovery_rate(p: Array) -> Array:
    """Benjamini-Hochberg q over all defined cells; NaN stays NaN."""
    defined = np.isfinite(p)
    q = np.full(p.shape, np.nan)
    if defined.any():
        q[defined] = stats.false_discovery_control(p[defined])
    return q
