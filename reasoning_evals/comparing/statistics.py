"""Accuracies, paired differences and their intervals. The unit of inference is the problem: k samples of one never count as
k problems (Miller, arXiv 2411.00640). Pure: numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from reasoning_evals.comparing.detection import Detection, Sampling, detection
from reasoning_evals.comparing.resampling import CONFIDENCE, Interval, bootstrap_interval, sign_flip_p

Clusters = Sequence[Hashable] | None
FEW = 30
"""Fewer units that changed, and less than half of all, are few: their t interval covers too seldom."""


class Estimate(NamedTuple):
    """A mean over problems with its standard error and t interval."""

    mean: float
    se: float
    low: float
    high: float
    num_problems: int
    df: int
    """Degrees of freedom: problems - 1, or clusters - 1."""


class PairedDifference(NamedTuple):
    """Mean over problems of (b - a), with three estimates of its uncertainty: interval, bootstrap interval, sign-flip test."""

    mean: float
    se: float
    low: float
    """Of the t interval; of shares of which few changed, of the wider one of it and ``_few_changed``."""
    high: float
    df: int
    p_value: float
    """From the t test; from the sign-flip test where all differences are equal (se 0)."""
    bootstrap_low: float
    bootstrap_high: float
    sign_flip_p: float
    """Exact where the differences are fractions with a small common denominator."""
    num_problems: int
    num_clusters: int | None
    num_changed: int
    """Problems, or clusters, whose difference is not 0."""
    loss_bound: float
    """Lower end of the mean that also reckons with losers that the sample has by chance not met: see ``loss_bound``."""
    detectable: float | None = None
    """Smallest true difference whose verdict such a run shows with 80% power; None where too few units changed to show any."""
    power: float | None = None
    """Of the verdict, if the true difference is the one found."""
    exaggeration: float | None = None
    """Mean difference in runs that show theirs / true difference, if that is the one found."""


def mean_estimate(values_P: ArrayLike, clusters: Clusters = None) -> Estimate:
    """Mean of per-problem values [P] with a t interval; with ``clusters``, the cluster-robust standard error:
    sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / n, with G - 1 degrees of freedom.

    ValueError with fewer than two problems or clusters.
    """
    values = _vector(values_P)
    n = len(values)
    mean = float(values.mean())
    residuals = unit_sums(values - mean, clusters)
    groups = len(residuals)
    if groups < 2:
        what = "problem" if clusters is None else "cluster"
        raise ValueError(f"an interval needs at least 2 {what}s, got {groups}: add problems")
    if np.abs(residuals).max() < 1e-12:  # equal values up to rounding of their mean: no variance
        residuals = np.zeros(groups)
    se = math.sqrt(groups / (groups - 1) * float((residuals**2).sum())) / n
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * se
    return Estimate(mean, se, mean - half, mean + half, n, groups - 1)


def proportion_estimate(values_P: ArrayLike, clusters: Clusters = None, most: float = math.inf) -> Estimate:
    """As ``mean_estimate`` for values in [0, 1], with Wilson's interval. Of problems where every value is 0 or 1 (one sample a
    problem, or none that varies); else, and with clusters, of as many trials as would have this standard error, with the
    quantile of t: a t interval around a share near 1 covers it in 86% to 90% of runs of 10 to 100 problems, this one in 93% or
    more, and in 91% where only four problems of 400 vary (Korn and Graubard 1998). ``most``: trials that they count for at most."""
    estimate = mean_estimate(values_P, clusters)
    values = _vector(values_P)
    if clusters is None and bool(np.isin(values, (0.0, 1.0)).all()):
        low, high = wilson_interval(float(values.sum()), len(values))
    elif estimate.se == 0:  # the t interval would have no width
        num_clusters = estimate.df + 1
        low, high = wilson_interval(estimate.mean * num_clusters, num_clusters)
    else:
        trials = min(most, estimate.mean * (1 - estimate.mean) / estimate.se**2)
        low, high = wilson_interval(estimate.mean * trials, trials, df=estimate.df)
    return estimate._replace(low=low, high=high)


def paired_difference(
    a_P: ArrayLike,
    b_P: ArrayLike,
    clusters: Clusters = None,
    denominator: int | None = None,
    num_resamples: int = 10_000,
    limit: float = math.inf,
    level: float | None = None,
) -> PairedDifference:
    """b - a for per-problem means of the same problems in the same order.

    ``denominator``: a whole number that makes every value times it a whole number (k for accuracies of k samples); the
    sign-flip test is then exact. ``limit``: the largest possible difference (1 for shares); the interval is cut to +-
    limit, and where few units changed it reckons with changes that the sample has not met. ``level``: the level at which a verdict on shares is decided; what it can detect is found only if it is given.
    """
    a, b = _vector(a_P), _vector(b_P)
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same problems on both sides, got {len(a)} and {len(b)}")
    difference = b - a
    if denominator is not None:
        difference = (
            np.rint(difference * denominator) / denominator
        )  # 1/3 computed in two ways becomes one number, so that ties are ties
    estimate = mean_estimate(difference, clusters)
    sums = unit_sums(difference, clusters)
    flip = sign_flip_p(sums, denominator)
    # If every problem changed by the same amount, t is 0/0 or infinite; the permutation test is still defined.
    p_value = float(2 * scipy.stats.t.sf(abs(estimate.mean) / estimate.se, estimate.df)) if estimate.se > 0 else flip
    resampled = bootstrap_interval(difference, clusters, num_resamples)
    units = sums * (len(sums) / len(difference))  # their mean is that of the problems
    units[np.abs(units) < 1e-12] = 0.0  # gains and losses of a cluster that cancel
    low, high = estimate.low, estimate.high
    num_changed = int(np.count_nonzero(units))
    if math.isfinite(limit) and num_changed < min(FEW, len(units) / 2) and estimate.se > 0:
        few = _few_changed(units)
        low, high = min(low, few.low), max(high, few.high)
    found = Detection(None, None)
    if level is not None:
        rate = float(a.mean()) if denominator == 1 and clusters is None else None
        several = clusters is None and denominator is not None and denominator > 1
        sampling = Sampling.of(a, b, denominator) if several and denominator else None
        half = len(units) / len(difference) / denominator if denominator else 0.0
        found = detection(units, estimate.mean, estimate.se, level, rate, sampling, half)
    return PairedDifference(
        mean=estimate.mean,
        se=estimate.se,
        low=max(-limit, low),
        high=min(limit, high),
        df=estimate.df,
        p_value=p_value,
        bootstrap_low=resampled.low,
        bootstrap_high=resampled.high,
        sign_flip_p=flip,
        num_problems=len(difference),
        num_clusters=None if clusters is None else estimate.df + 1,
        num_changed=num_changed,
        loss_bound=min(low, loss_bound(units)) if estimate.se > 0 else loss_bound(units),
        detectable=found.smallest,
        power=found.at_mean and found.at_mean.power,
        exaggeration=found.at_mean and found.at_mean.exaggeration,
    )


def _few_changed(units_U: NDArray[np.float64]) -> Interval:
    """Interval of a mean of units of which most may not have changed: gains less losses, each a share of the largest change seen with
    Wilson's interval, joined with their correlation (MOVER, Zou and Donner 2008).

    A t interval of a chance of gains of 5% covers in 88% of runs of 100 problems, of 2% in 86% of runs of 240: its spread is that of the changes that the sample
    has met, and it knows no loss where none was met. This one covers in 95% or more of the runs in which anything changed.
    """
    most = float(np.abs(units_U).max())
    gains, losses = np.maximum(units_U, 0) / most, np.maximum(-units_U, 0) / most
    up, down = proportion_estimate(gains), proportion_estimate(losses)
    joint = float(np.corrcoef(gains, losses)[0, 1]) if up.se > 0 and down.se > 0 else 0.0

    def reach(first: float, second: float) -> float:
        return most * math.sqrt(max(0.0, first**2 + second**2 - 2 * joint * first * second))

    mean = most * (up.mean - down.mean)
    return Interval(
        mean - reach(up.mean - up.low, down.high - down.mean), mean + reach(up.high - up.mean, down.mean - down.low)
    )


def loss_bound(differences_U: ArrayLike) -> float:
    """Lower end of the mean difference of units, given that a loss may sit in a few of them: with L of n units that lose c or more,
    up to U of all units may (exact bound of a binomial share, U(0) = 1 - .05^(1/n)), so the mean may be c (U - L/n) lower than
    found. The worst c, of all sizes of loss seen and of a unit that is lost outright (c = 1), counts.

    A t interval does not see this: where the sample has met none of the losers, it is a sliver.
    """
    units = _vector(differences_U)
    num = len(units)
    sizes = np.unique(np.append(-units[units < 0], max(1.0, float(-units.min()))))
    losers = np.array([(units <= -size + 1e-12).sum() for size in sizes])
    most = np.where(losers < num, scipy.stats.beta.ppf(CONFIDENCE, losers + 1, np.maximum(num - losers, 1)), 1.0)
    return float(units.mean() - (sizes * (most - losers / num)).max())


def wilson_interval(successes: float, num: float, confidence: float = CONFIDENCE, df: float = math.inf) -> Interval:
    """Wilson's score interval of a proportion; the numbers need not be whole (an effective number of trials, whose ``df`` the
    quantile of t is taken at)."""
    if not 0 <= successes <= num or num <= 0:
        raise ValueError(f"{successes} successes of {num} trials: expected 0 <= successes <= trials and a trial")
    z = float(scipy.stats.t.ppf((1 + confidence) / 2, df))
    share = successes / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    # At 0 and at all the bound is exactly 0 or 1, which rounding would miss.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == num else centre + half)


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact McNemar test for one sample a problem: problems that only b solved against those that only a solved."""
    return float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct): 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374).

    >>> round(pass_at_k(4, 1, 2), 12)
    0.5
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_correct} correct in {num_samples}: expected correct <= samples and k <= samples"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """maj@k of one problem: is the most frequent answer correct? Equally frequent answers share the vote; samples without
    an answer (None) do not vote. 0 when no sample has an answer.

    >>> majority_correct(["4", "4", "5"], [True, True, False]), majority_correct(["4", "5", None], [True, False, False])
    (1.0, 0.5)
    """
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers and {len(correct)} verdicts: expected as many")
    votes: dict[Hashable, list[bool]] = {}
    for answer, is_correct in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(is_correct)
    most = max(map(len, votes.values()), default=0)
    winners = [verdicts for verdicts in votes.values() if len(verdicts) == most]
    return sum(sum(verdicts) / len(verdicts) for verdicts in winners) / len(winners) if winners else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0 or not np.isfinite(vector).all():
        raise ValueError(
            f"expected one finite number a problem, got an array of shape {vector.shape} with {vector[:3]}"
        )
    return vector


def unit_sums(values_P: ArrayLike, clusters: Clusters) -> NDArray[np.float64]:
    """Sums over clusters, in order of appearance; the values themselves without."""
    values = np.asarray(values_P, dtype=np.float64)
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} cluster ids for {len(values)} problems: expected one each")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return np.bincount(index, weights=values).astype(np.float64)
