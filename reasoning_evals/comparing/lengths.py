"""Length of one arm against another: a ratio of mean tokens over the same problems, judged on its logarithm, over clusters.

Why the logarithm: lengths are skewed, and a symmetric interval of their difference or ratio covers too seldom. Why the
jackknife and not the linearised variance: a few long problems carry the means, and leaving each out shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from reasoning_evals.comparing.resampling import CONFIDENCE, sign_flip_p

ESTIMAND = "ratio of mean tokens over the same problems"


class LogRatio(NamedTuple):
    """mean(b) / mean(a) with its 95% interval and the p of "no change"."""

    value: float
    low: float | None
    """None, as the upper end, where tokens are left in fewer than two units of an arm, so that no logarithm says how sure this is."""
    high: float | None
    p_value: float


def paired_log_ratio(
    a_P: Sequence[float], b_P: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> LogRatio:
    """mean(b) / mean(a) over the same problems in the same order, and exp(log ratio +- t se).

    se: jackknife over problems, or over ``clusters``, (G-1)/G sum_g (log ratio without g - log ratio)^2. t has G' - 1 degrees of
    freedom, G' = 1 / sum_g w_g^2 with w_g the share of unit g in all tokens (Kish's effective number): 30 problems of which three
    hold most tokens say as much as three. p: of that t, or of the sign-flip test where there is no logarithm or all changed alike.
    ValueError with fewer than two problems or clusters, unequal numbers of problems, or a mean of a that is not positive.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a ratio needs the same two or more problems in both arms, got {len(a)} and {len(b)}")
    if a.mean() <= 0:
        raise ValueError(f"the first arm has {a.mean():g} tokens a problem: there is nothing to divide by")
    numbers: dict[Hashable, int] = {}
    index_P = [numbers.setdefault(name, len(numbers)) for name in (range(len(a)) if clusters is None else clusters)]
    a_G, b_G = np.bincount(index_P, weights=a), np.bincount(index_P, weights=b)
    num = len(a_G)
    if num < 2:
        raise ValueError(f"a ratio needs at least 2 clusters, got {num}: add problems")
    ratio = float(b.sum() / a.sum())
    rest_a_G, rest_b_G = a_G.sum() - a_G, b_G.sum() - b_G
    if min(rest_a_G.min(), rest_b_G.min()) < 1e-9 * a.sum():
        return LogRatio(ratio, None, None, sign_flip_p(b_G - a_G))
    away_G = np.log(rest_b_G / rest_a_G) - math.log(ratio)
    se = math.sqrt((num - 1) / num * float((away_G**2).sum()))
    if se < 1e-12:
        return LogRatio(ratio, ratio, ratio, sign_flip_p(b_G - a_G))
    share_G = (a_G / a_G.sum() + b_G / b_G.sum()) / 2
    df = max(1.0, 1 / float((share_G**2).sum()) - 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * se
    p_value = float(2 * stats.t.sf(abs(math.log(ratio)) / se, df))
    return LogRatio(ratio, ratio * math.exp(-half), ratio * math.exp(half), p_value)
