"""Made-up worlds in which the truth about two arms is known: how often verdicts, intervals and bounds are right in them.

Each function returns shares over ``runs`` simulated runs; ``se`` is the standard error of such a share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from reasoning_evals.comparing.pairing import paired_log_ratio
from reasoning_evals.comparing.statistics import PairedDifference, holm, mcnemar_p, paired_difference
from reasoning_evals.comparing.verdicts import ALPHA, verdict_p

Array = NDArray[np.float64]
Judged = Callable[[Sequence[float]], Sequence[float]]
"""p-values of the verdicts of one run -> those that the words follow."""


def se(share: float, runs: int) -> float:
    return math.sqrt(max(share * (1 - share), 0.01) / runs)


MIXED, SETTLED, HARD = (2.0, 1.5), (0.7, 0.3), (0.9, 2.1)
"""Beta distributions of the rates of problems: accuracy 57% and all rates; accuracy 70%, most problems nearly always right or wrong; accuracy 30%."""


def difficulties(random: np.random.Generator, num: int, shape: tuple[float, float] = MIXED) -> Array:
    """Rates of problems."""
    return random.beta(*shape, num)


def shifted(rates: Array, spread: Array, effect: float) -> Array:
    """Rates of an arm whose true mean effect is exactly ``effect``, with its own effect on every problem."""
    low, high = -2.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = float(np.clip(rates + spread + middle, 0, 1).mean() - rates.mean())
        low, high = (middle, high) if mean < effect else (low, middle)
    return np.clip(rates + spread + high, 0, 1)


def sampled(random: np.random.Generator, rates: Array, k: int) -> Array:
    """Share of right samples of each problem."""
    return random.binomial(k, rates) / k


def found(a: Array, b: Array, k: int, level: float | None = None) -> PairedDifference:
    return paired_difference(a, b, None, k, num_resamples=1, limit=1.0, level=level)


def own_p(difference: PairedDifference, a: Array, b: Array, k: int) -> float:
    exact = mcnemar_p(int((b > a).sum()), int((b < a).sum())) if k == 1 else None
    return verdict_p(difference, exact)


def family_wise_error(
    num_problems: int, k: int, num_arms: int, runs: int, seed: int, judge: Judged = holm
) -> tuple[float, float]:
    """Arms that differ from the baseline by nothing: (runs with any verdict, verdicts). Arms share the baseline."""
    random = np.random.default_rng(seed)
    any_shown = shown = 0
    for _ in range(runs):
        rates = difficulties(random, num_problems)
        base = sampled(random, rates, k)
        arms = [sampled(random, rates, k) for _ in range(num_arms)]
        words = [p < ALPHA for p in judge([own_p(found(base, arm, k), base, arm, k) for arm in arms])]
        any_shown += any(words)
        shown += sum(words)
    return any_shown / runs, shown / runs / num_arms


def one_pair(
    num_problems: int, k: int, runs: int, seed: int, effect: float = 0.0, spread: float = 0.1
) -> tuple[float, float]:
    """(share of runs whose verdict is that of an effect, coverage of the 95% interval); true effects vary over problems."""
    random = np.random.default_rng(seed)
    shown = covered = 0
    for _ in range(runs):
        own = random.normal(0, spread, num_problems)
        rates = difficulties(random, num_problems)
        # The mean effect over the population of problems: effects of single problems are kept inside [0, 1] symmetrically.
        own = np.clip(own, -np.minimum(rates, 1 - rates), np.minimum(rates, 1 - rates))
        a, b = sampled(random, rates, k), sampled(random, np.clip(rates + own + effect, 0, 1), k)
        difference = found(a, b, k)
        shown += own_p(difference, a, b, k) < ALPHA
        covered += difference.low <= effect <= difference.high
    return shown / runs, covered / runs


def power_at_the_named_effect(
    num_problems: int,
    k: int,
    runs: int,
    seed: int,
    named: Callable[[PairedDifference], float | None] = lambda difference: difference.detectable,
    spread: float = 0.05,
    num_arms: int = 1,
    shape: tuple[float, float] = MIXED,
) -> float:
    """A run without an effect names the smallest that it could have shown; how often does a run with that effect show it?"""
    random = np.random.default_rng(seed)
    shown = tried = 0
    while tried < runs:
        rates = difficulties(random, num_problems, shape)
        own = random.normal(0, spread, num_problems)
        a, b = sampled(random, rates, k), sampled(random, shifted(rates, own, 0.0), k)
        seen = found(a, b, k, ALPHA / num_arms)
        effect = named(seen)
        if effect is None or effect > 1 - rates.mean() or seen.mean < -seen.se:  # the last names a loss
            continue
        tried += 1
        a, b = sampled(random, rates, k), sampled(random, shifted(rates, own, effect), k)
        shown += own_p(found(a, b, k), a, b, k) < ALPHA / num_arms
    return shown / runs


def power_of_a_shown_effect(
    num_problems: int, k: int, effect: float, runs: int, seed: int, shape: tuple[float, float] = MIXED
) -> tuple[float, float]:
    """Runs with a true effect that show it say with what power they would, if it were as large as it looks: (what they say on average,
    how often a further run with an effect of that size shows it)."""
    random = np.random.default_rng(seed)
    said: list[float] = []
    again = 0
    while len(said) < runs:
        rates = difficulties(random, num_problems, shape)
        own = random.normal(0, 0.05, num_problems)
        a, b = sampled(random, rates, k), sampled(random, shifted(rates, own, effect), k)
        seen = found(a, b, k)
        if own_p(seen, a, b, k) >= ALPHA or not 0 < seen.mean < 1 - rates.mean():
            continue
        said.append(found(a, b, k, ALPHA).power or 0.0)
        a, b = sampled(random, rates, k), sampled(random, shifted(rates, own, seen.mean), k)
        again += own_p(found(a, b, k), a, b, k) < ALPHA
    return float(np.mean(said)), again / runs


def called_held(
    num_problems: int,
    k: int,
    losers: float,
    loss: float,
    runs: int,
    seed: int,
    low: Callable[[PairedDifference], float] = lambda difference: difference.loss_bound,
    margin: float = 0.03,
    noise: float = 0.05,
) -> float:
    """A share of problems loses ``loss`` of its rate, the others nothing: how often is that called held? Most problems are solved
    always or never; a share ``noise`` of them is not settled and differs between samples."""
    random = np.random.default_rng(seed)
    held = 0
    for _ in range(runs):
        rates = (random.random(num_problems) < 0.7).astype(float)
        rates[random.random(num_problems) < noise] = 0.5
        losing = random.random(num_problems) < losers
        rates[losing] = 1.0
        a, b = sampled(random, rates, k), sampled(random, np.where(losing, 1 - loss, rates), k)
        held += low(found(a, b, k)) > -margin
    return held / runs


Lengths = tuple[Sequence[float], Sequence[float], Sequence[int]]


def covered_lengths(
    num_clusters: int,
    size: int,
    sd: float,
    runs: int,
    seed: int,
    interval: Callable[[Lengths], tuple[float, float]] | None = None,
    together: float = 0.6,
    k: int = 1,
) -> float:
    """Coverage of a ratio of 0.8: lognormal lengths whose arms differ by noise, a share ``together`` of it common to a cluster."""
    random = np.random.default_rng(seed)
    interval = interval or log_ratio_interval
    index = np.repeat(np.arange(num_clusters), size)
    together = together if size > 1 else 0.0
    covered = 0
    for _ in range(runs):
        base = random.normal(6, 0.6, len(index))

        def arm(base: Array = base) -> Array:
            common = random.normal(0, sd * math.sqrt(together), num_clusters)[index]
            own = random.normal(0, sd * math.sqrt(1 - together), (k, len(index)))
            return np.exp(base + common + own).mean(0)

        a, b = arm(), 0.8 * arm()
        low, high = interval((a.tolist(), b.tolist(), index.tolist()))
        covered += low <= 0.8 <= high
    return covered / runs


def log_ratio_interval(lengths: Lengths) -> tuple[float, float]:
    result = paired_log_ratio(*lengths)
    assert result.low is not None
    assert result.high is not None
    return result.low, result.high
