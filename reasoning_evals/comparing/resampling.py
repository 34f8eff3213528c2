"""Bootstrap and permutation over problems, or over clusters of them. Seeded, so that the same data give the same numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
"""Of every interval."""
_BLOCK = 2_000_000  # random numbers drawn at a time
_EXACT_STATES = 2_000_000


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def bootstrap_interval(
    values_P: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
) -> Interval:
    """Interval of the mean by resampling problems, or whole clusters (the mean is then sum of sums / sum of sizes).

    Percentile interval.
    """
    values = np.asarray(values_P, dtype=np.float64)
    sums, sizes = _groups(values, clusters)
    groups = len(sums)
    random = np.random.default_rng(0)
    means = np.empty(num_resamples)
    step = max(1, _BLOCK // groups)
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        chosen = random.integers(0, groups, (rows, groups))
        means[start : start + rows] = sums[chosen].sum(-1) / sizes[chosen].sum(-1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def sign_flip_p(differences: ArrayLike, denominator: int | None = None, num_permutations: int = 9_999) -> float:
    """Two-sided p of the sign-flip permutation test: how often a sum with random signs is at least as far from 0 as the
    observed one.

    Why it is valid: if the arms do not differ, swapping them in a problem is as likely as not, so each difference could as
    well have had the other sign.

    Exact over all 2^n sign patterns when ``denominator`` makes every difference a whole number and their sum is small enough to
    tabulate; otherwise from random patterns, as (1 + hits) / (1 + patterns). With differences of -1, 0 and 1 it is the
    exact McNemar test.
    """
    values = np.asarray(differences, dtype=np.float64)
    sizes, seen = np.abs(values[values != 0]), abs(float(values.sum()))
    if len(sizes) == 0:
        return 1.0
    if denominator is not None:
        whole = np.rint(sizes * denominator)
        if not np.allclose(whole, sizes * denominator, atol=1e-6):
            raise ValueError(f"the differences are not fractions of {denominator}: leave the denominator out")
        if whole.sum() <= _EXACT_STATES / max(1, len(whole) // 100):
            return _exact_sign_flip(whole.astype(np.int64), round(seen * denominator))
    random = np.random.default_rng(0)
    hits = 0
    step = max(1, _BLOCK // len(sizes))
    for start in range(0, num_permutations, step):
        signs = random.integers(0, 2, (min(step, num_permutations - start), len(sizes))) * 2 - 1
        # Sums that are equal except for the order of addition must count as equal, hence the tolerance.
        hits += int((np.abs(signs @ sizes) >= seen * (1 - 1e-12) - 1e-12).sum())
    return (1 + hits) / (1 + num_permutations)


def _exact_sign_flip(sizes: NDArray[np.int64], seen: int) -> float:
    total = int(sizes.sum())
    share = np.zeros(
        total + 1
    )  # share[t]: the share of sign patterns whose positive differences add up to t (dynamic programming over the problems)
    share[0] = 1.0
    reached = 0
    for size in sizes.tolist():
        share[size : reached + size + 1] = share[size : reached + size + 1] + share[: reached + 1]
        share[: reached + size + 1] *= 0.5
        reached += size
    far = np.abs(2 * np.arange(total + 1) - total) >= seen
    return min(1.0, float(share[far].sum()))


def _groups(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if clusters is None:
        return values, np.ones(len(values))
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)
