"""Power of a paired comparison: problems and samples that an effect needs, from a baseline run, a pilot or assumed numbers.

Var(mean difference) = (w^2 + (E p(1-p)_a + E p(1-p)_b - 2 cov) / k) / n, with n problems, k samples each, w^2 the variance over
problems of the true effect, and cov the covariance within problems of samples with equal seeds. More samples reduce the second
part only. What such a comparison shows is asked of its verdict (``detection``), not of a normal test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from reasoning_evals.comparing.detection import (
    LARGE,
    Decide,
    least_units,
    planned_decision,
    planned_effect,
    single_samples,
    smallest_effect,
)
from reasoning_evals.comparing.tables import refuse_degenerate


class VarianceParts(NamedTuple):
    """Unbiased estimates from two arms on the same problems."""

    effect_variance: float
    """w^2: variance over problems of the true per-problem difference; can be below 0 by chance where it is small."""
    noise_a: float
    """E p(1-p) of arm a: variance of one sample around its problem's rate."""
    noise_b: float
    covariance: float
    """Within problems, of samples of equal number, which have the same seed: above 0 where arms often write the same."""

    @property
    def noise(self) -> float:
        """Variance of the difference of two samples of equal number around its problem's."""
        return max(0.0, self.noise_a + self.noise_b - 2 * self.covariance)


def variance_parts(correct_a_PK: ArrayLike, correct_b_PK: ArrayLike) -> VarianceParts:
    """Split the variance of the difference into its parts: correctness (0 or 1) by problem and sample, equal places equal seeds.

    ValueError with one sample a problem, where the parts cannot be separated.
    """
    a, b = np.asarray(correct_a_PK, dtype=np.float64), np.asarray(correct_b_PK, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"expected two tables problems x samples over the same >= 2 problems, got {a.shape} and {b.shape}"
        )
    few, many = sorted((a.shape[1], b.shape[1]))
    if few < 2:
        raise ValueError("with one sample a problem noise and effect cannot be told apart: sample at least 2")
    noise_a, noise_b = float(a.var(axis=1, ddof=1).mean()), float(b.var(axis=1, ddof=1).mean())
    same_a, same_b = a[:, :few], b[:, :few]
    products = (same_a - same_a.mean(1, keepdims=True)) * (same_b - same_b.mean(1, keepdims=True))
    covariance = float(products.sum(1).mean()) / (few - 1)
    total = float((b.mean(1) - a.mean(1)).var(ddof=1))
    effect = total - noise_a / a.shape[1] - noise_b / b.shape[1] + 2 * covariance / many
    return VarianceParts(effect, noise_a, noise_b, covariance)


def sampling_noise(correct_PK: ArrayLike) -> float:
    """E p(1-p) of one arm, unbiased: what a baseline run alone says about the power of a later comparison."""
    table = np.asarray(correct_PK, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"expected a table problems x samples with at least 2 samples, got {table.shape}")
    return float(table.var(axis=1, ddof=1).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """The assumptions from which the size of a comparison follows."""

    noise: float
    """Variance of the difference of two samples of equal number around its problem's: E p(1-p) of both arms together, less twice the
    covariance that equal seeds bring."""
    effect_variance: float
    """w^2: variance over problems of the true effect. An estimate can be below 0: then it holds up to ``measured_k``."""
    noise_source: str
    """How the noise was found, in words."""
    effect_source: str
    accuracy: float | None = None
    """Of the baseline."""
    changed: float = 1.0
    """Share of problems that change between the arms, with several samples; with one it follows from the variance."""
    measured_k: int | None = None
    """Samples a problem of the pair that was measured."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise of two arms must be in [0, 1], got {self.noise}: p(1-p) is at most 0.25 an arm")
        if not (math.isfinite(self.effect_variance) and -1 <= self.effect_variance <= 1):
            raise ValueError(
                f"effect_sd must be in [0, 1], got variance {self.effect_variance}: it is a spread of shares, 0.1 is 10 points"
            )

    def variance(self, k: int) -> float:
        """Of a problem's difference with k samples: w^2 + noise / k. Where w^2 was estimated below 0, the variance that was measured is
        kept, and all of it shrinks with more samples than were measured."""
        if self.effect_variance < 0 and self.measured_k is not None and k > self.measured_k:
            return self.variance(self.measured_k) * self.measured_k / k
        return max(0.0, self.effect_variance + self.noise / k)

    def samples_for(self, variance: float) -> int | None:
        """The least k with at most this variance; None where none is."""
        room = variance - self.effect_variance
        if room <= 0 or variance <= 0:  # the second: too few problems for any verdict
            return None
        k = max(1, math.ceil(self.noise / room - 1e-9))
        if self.effect_variance < 0 and self.measured_k is not None and k > self.measured_k:
            return math.ceil(self.variance(self.measured_k) * self.measured_k / variance - 1e-9)
        return k


class Planned(NamedTuple):
    """The verdict of a planned comparison: n problems, k samples; see ``detection``."""

    assumptions: Assumptions
    k: int
    alpha: float
    target_power: float

    def power(self, effect: float, num_problems: int) -> float:
        """Chance that a true effect is shown.

        >>> given = Assumptions(noise=0.2, effect_variance=0.01, noise_source="", effect_source="")
        >>> round(Planned(given, 4, 0.05, 0.8).power(0.05, 198), 1)
        0.8
        """
        given = self.assumptions
        if self.k == 1:
            return self._single(num_problems)(abs(effect)).power
        if round(num_problems * given.changed) < least_units(self.alpha):
            return 0.0
        decide = planned_decision(num_problems, given.changed, self.alpha, given.variance(self.k), self.k)
        return decide(abs(effect)).power

    def detectable(self, num_problems: int) -> float | None:
        """Smallest effect with the target power; None where nothing can be shown, or nothing is known of the spread."""
        share, variance = self.assumptions.changed, self.assumptions.variance(self.k)
        if self.k == 1:
            found = smallest_effect(self._single(num_problems), self.target_power)
        else:
            found = variance and planned_effect(num_problems, share, self.alpha, self.target_power, variance, self.k)
        return found if 0 < found <= 1 else None

    def problems_needed(self, effect: float) -> int | None:
        """Least number of problems with the target power; None where no problem of the pair that was measured changed."""
        if self.k > 1 and self.assumptions.changed == 0:
            return None
        quantile = float(scipy.stats.norm.ppf([1 - self.alpha / 2, self.target_power]).sum())
        # Where both tests were normal ones: n effect = quantile sqrt(n variance) + 1 / k.
        spread = quantile * math.sqrt(self.assumptions.variance(self.k))
        about = ((spread + math.sqrt(spread**2 + 4 * abs(effect) / self.k)) / 2 / effect) ** 2
        if self.k > 1 and about > LARGE:
            return math.ceil(about)
        low, high = least_units(self.alpha) - 1, math.ceil(2 * about) + 60
        while not self._suffices(effect, high):  # the exact test of few changes needs many more than a normal one
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._suffices(effect, middle) else (middle, high)
        return high

    def _single(self, num_problems: int) -> Decide:
        given = self.assumptions
        return single_samples(num_problems, min(1.0, given.variance(1)), given.accuracy, self.alpha)

    def _suffices(self, effect: float, num_problems: int) -> bool:
        if self.k == 1 or self.assumptions.variance(self.k) == 0:
            return self.power(effect, num_problems) >= self.target_power
        return (self.detectable(num_problems) or math.inf) <= abs(effect)

    def samples_needed(self, effect: float, num_problems: int) -> int | None:
        """Samples a problem for the target power (``k`` is not read); None where the effect varies too much over so few problems."""
        if self._replace(k=1).power(effect, num_problems) >= self.target_power:
            return 1
        units = planned_effect(num_problems, self.assumptions.changed, self.alpha, self.target_power, 1.0, math.inf)
        found = self.assumptions.samples_for((effect / units) ** 2)
        found = found and max(2, found)
        while found and not self._replace(k=found)._suffices(
            effect, num_problems
        ):  # sums of few samples take few values
            found += max(1, found // 50)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerPlan:
    """Sizes of a comparison and the effects that they detect. Effects are shares: 0.05 is 5 points."""

    assumptions: Assumptions
    target_power: float
    alpha: float
    """Of one arm's verdict: the level of all divided by the number of arms, Holm's first threshold."""
    effects: tuple[float, ...]
    samples: tuple[int, ...]
    problems: tuple[int, ...]
    needed: tuple[tuple[int | None, ...], ...]
    """Problems needed, [samples][effects]; None where it is not known how many would change."""
    detectable: tuple[tuple[float | None, ...], ...]
    """Smallest effect with the target power, [samples][problems]; None where nothing can be shown."""
    power: tuple[tuple[tuple[float, ...], ...], ...]
    """Power for each effect, [effects][samples][problems]."""
    samples_needed: tuple[tuple[int | None, ...], ...]
    """Samples a problem for the effect, [effects][problems]; None where no number is enough."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def assume_from_baseline(correct_PK: ArrayLike, effect_sd: float = 0.1) -> Assumptions:
    """From one arm's correctness by problem and sample; the other arm is assumed to be as noisy.

    With one sample a problem the noise cannot be separated from the spread of difficulty, so its upper bound is used: p(1-p) of
    the mean accuracy. ValueError for a baseline from which nothing can be planned.
    """
    table = np.asarray(correct_PK, dtype=np.float64)
    refuse_degenerate("the baseline", table)
    if table.ndim == 2 and table.shape[1] == 1:
        rate = float(table.mean())
        noise, source = rate * (1 - rate), "its upper bound p(1-p), as the baseline has one sample a problem"
    else:
        noise, source = sampling_noise(table), "measured on the baseline"
    return Assumptions(
        noise=2 * noise,
        effect_variance=effect_sd**2,
        noise_source=f"{source}; the other arm taken alike, and equal seeds to bring nothing",
        effect_source="assumed",
        accuracy=float(table.mean()),
    )


def assume_from_pair(correct_a_PK: ArrayLike, correct_b_PK: ArrayLike) -> Assumptions:
    """From two arms on the same problems, samples of equal number in equal places: noise, spread of the effect and share of problems that
    change are measured. At the pair's own number of samples the variance is that of the paired differences. ValueError for a baseline
    (``a``) from which nothing can be planned."""
    refuse_degenerate("the baseline", np.asarray(correct_a_PK, dtype=np.float64))
    parts = variance_parts(correct_a_PK, correct_b_PK)
    a, b = np.asarray(correct_a_PK, dtype=np.float64), np.asarray(correct_b_PK, dtype=np.float64)
    changed = float((np.abs(a.mean(1) - b.mean(1)) > 1e-9).mean())
    source = "measured on both arms, samples of equal number paired"
    spread = source
    if parts.effect_variance <= 0:
        spread += ": no spread beyond the noise was seen, so the measured variance of the differences is used"
    return Assumptions(
        noise=parts.noise,
        effect_variance=parts.effect_variance,
        noise_source=source,
        effect_source=spread,
        accuracy=float(a.mean()),
        changed=changed,
        measured_k=min(a.shape[1], b.shape[1]),
    )


def plan_power(
    assumptions: Assumptions,
    effects: Sequence[float] = (0.02, 0.05, 0.1),
    samples: Sequence[int] = (1, 4, 8, 16, 32, 64),
    problems: Sequence[int] = (30, 60, 198, 500),
    target_power: float = 0.8,
    alpha: float = 0.05,
    num_arms: int = 1,
) -> PowerPlan:
    """The verdict that a comparison gives: the exact McNemar test with one sample a problem, otherwise t and sign-flip test, over
    problems, two-sided. ``num_arms``: arms that are compared with the baseline at once; each is planned at ``alpha`` / num_arms."""
    if not effects or not all(0 < abs(effect) <= 1 for effect in effects):
        raise ValueError(f"effects must be shares in (0, 1], got {list(effects)}: 0.05 is 5 points")
    if not samples or min(samples) < 1 or not problems or min(problems) < 2:
        raise ValueError(f"expected samples >= 1 and problems >= 2, got {list(samples)} and {list(problems)}")
    if not alpha < target_power < 1 or not 0 < alpha < 1:
        raise ValueError(f"expected 0 < alpha < power < 1, got alpha {alpha} and power {target_power}")
    if num_arms < 1:
        raise ValueError(f"expected one arm or more beside the baseline, got {num_arms}")
    level = alpha / num_arms
    planned = {k: Planned(assumptions, k, level, target_power) for k in samples}
    one = Planned(assumptions, 1, level, target_power)
    return PowerPlan(
        assumptions=assumptions,
        target_power=target_power,
        alpha=level,
        effects=tuple(effects),
        samples=tuple(samples),
        problems=tuple(problems),
        needed=tuple(tuple(planned[k].problems_needed(effect) for effect in effects) for k in samples),
        detectable=tuple(tuple(planned[k].detectable(n) for n in problems) for k in samples),
        power=tuple(tuple(tuple(planned[k].power(effect, n) for n in problems) for k in samples) for effect in effects),
        samples_needed=tuple(tuple(one.samples_needed(effect, n) for n in problems) for effect in effects),
    )
