"""Power of a paired comparison: problems and samples that an effect needs, from a baseline run, a pilot or assumed numbers.

Var(mean difference) = (w^2 + (E p(1-p)_a + E p(1-p)_b) / k) / n, with n problems, k samples each, and w^2 the variance over
problems of the true effect. More samples reduce the second part only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from reasoning_evals.comparing.statistics import detectable_effect


class VarianceParts(NamedTuple):
    """Unbiased estimates from two arms on the same problems."""

    effect_variance: float
    """w^2: variance over problems of the true per-problem difference; can be below 0 by chance where it is small."""
    noise_a: float
    """E p(1-p) of arm a: variance of one sample around its problem's rate."""
    noise_b: float


def variance_parts(correct_a_PK: ArrayLike, correct_b_PK: ArrayLike) -> VarianceParts:
    """Split the variance of the difference into its parts: correctness (0 or 1) by problem and sample.

    ValueError with one sample a problem, where the parts cannot be separated.
    """
    a, b = np.asarray(correct_a_PK, dtype=np.float64), np.asarray(correct_b_PK, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"expected two tables problems x samples over the same >= 2 problems, got {a.shape} and {b.shape}"
        )
    if a.shape[1] < 2 or b.shape[1] < 2:
        raise ValueError("with one sample a problem noise and effect cannot be told apart: sample at least 2")
    noise_a, noise_b = float(a.var(axis=1, ddof=1).mean()), float(b.var(axis=1, ddof=1).mean())
    total = float((b.mean(1) - a.mean(1)).var(ddof=1))
    return VarianceParts(total - noise_a / a.shape[1] - noise_b / b.shape[1], noise_a, noise_b)


def sampling_noise(correct_PK: ArrayLike) -> float:
    """E p(1-p) of one arm, unbiased: what a baseline run alone says about the power of a later comparison."""
    table = np.asarray(correct_PK, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"expected a table problems x samples with at least 2 samples, got {table.shape}")
    return float(table.var(axis=1, ddof=1).mean())


def difference_se(num_problems: int, k: int, effect_variance: float, noise: float) -> float:
    """Standard error of the mean paired difference; ``noise`` is E p(1-p)_a + E p(1-p)_b."""
    return math.sqrt(max(0.0, effect_variance + noise / k) / num_problems)


def power(effect: float, num_problems: int, k: int, effect_variance: float, noise: float, alpha: float = 0.05) -> float:
    """Probability that a two-sided test of level alpha detects a true mean difference of ``effect`` (normal approximation).

    >>> round(power(0.05, 198, 4, effect_variance=0.01, noise=0.2), 2)
    0.82
    """
    se = difference_se(num_problems, k, effect_variance, noise)
    if se == 0:
        return 1.0 if effect else alpha
    border, shift = stats.norm.ppf(1 - alpha / 2), effect / se
    return float(stats.norm.cdf(shift - border) + stats.norm.cdf(-shift - border))


def problems_needed(
    effect: float, k: int, effect_variance: float, noise: float, target_power: float = 0.8, alpha: float = 0.05
) -> int:
    """Problems for the target power: (z_{1-alpha/2} + z_power)^2 (w^2 + noise / k) / effect^2, rounded up.

    >>> [problems_needed(0.05, k, effect_variance=0.01, noise=0.2) for k in (1, 8, 16, 64)]
    [660, 110, 71, 42]
    """
    if effect == 0:
        raise ValueError("an effect of 0 cannot be shown with any number of problems: give the effect to look for")
    factor = (stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(target_power)) ** 2
    return max(2, math.ceil(factor * (effect_variance + noise / k) / effect**2 - 1e-9))


def samples_needed(
    effect: float,
    num_problems: int,
    effect_variance: float,
    noise: float,
    target_power: float = 0.8,
    alpha: float = 0.05,
) -> int | None:
    """Samples a problem for the target power; None when no number suffices because the effect varies too much between so
    few problems."""
    factor = (stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(target_power)) ** 2
    room = num_problems * effect**2 / factor - effect_variance
    return max(1, math.ceil(noise / room - 1e-9)) if room > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """The assumptions from which the size of a comparison follows."""

    noise: float
    """E p(1-p) of both arms together: variance of a sample around its problem's rate."""
    effect_sd: float
    """w: standard deviation over problems of the true effect."""
    noise_source: str
    """How the noise was found, in words."""
    effect_sd_source: str

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 0.5:
            raise ValueError(f"noise of two arms must be in [0, 0.5], got {self.noise}: p(1-p) is at most 0.25 an arm")
        if not (math.isfinite(self.effect_sd) and 0 <= self.effect_sd <= 1):
            raise ValueError(
                f"effect_sd must be in [0, 1], got {self.effect_sd}: it is a spread of shares, 0.1 is 10 points"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerPlan:
    """Sizes of a comparison and the effects that they detect. Effects are shares: 0.05 is 5 points."""

    assumptions: Assumptions
    target_power: float
    alpha: float
    effects: tuple[float, ...]
    samples: tuple[int, ...]
    problems: tuple[int, ...]
    needed: tuple[tuple[int, ...], ...]
    """Problems needed, [samples][effects]."""
    detectable: tuple[tuple[float, ...], ...]
    """Smallest effect with the target power, [samples][problems]."""
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
    the mean accuracy.
    """
    table = np.asarray(correct_PK, dtype=np.float64)
    if table.ndim == 2 and table.shape[1] == 1:
        rate = float(table.mean())
        noise, source = rate * (1 - rate), "its upper bound p(1-p), as the baseline has one sample a problem"
    else:
        noise, source = sampling_noise(table), "measured on the baseline"
    return Assumptions(
        noise=2 * noise,
        effect_sd=effect_sd,
        noise_source=f"{source}; the other arm taken alike",
        effect_sd_source="assumed",
    )


def assume_from_pair(correct_a_PK: ArrayLike, correct_b_PK: ArrayLike) -> Assumptions:
    """From two arms on the same problems: noise and spread of the effect are both measured. A negative estimate of the
    spread, which can occur by chance, counts as 0 and is reported."""
    parts = variance_parts(correct_a_PK, correct_b_PK)
    source = "measured on both arms"
    spread = source if parts.effect_variance > 0 else f"{source}: estimated at or below 0, try larger values too"
    return Assumptions(
        noise=min(0.5, parts.noise_a + parts.noise_b),
        effect_sd=math.sqrt(max(0.0, parts.effect_variance)),
        noise_source=source,
        effect_sd_source=spread,
    )


def plan_power(
    assumptions: Assumptions,
    effects: Sequence[float] = (0.02, 0.05, 0.1),
    samples: Sequence[int] = (1, 4, 8, 16, 32, 64),
    problems: Sequence[int] = (30, 60, 198, 500),
    target_power: float = 0.8,
    alpha: float = 0.05,
) -> PowerPlan:
    """Two-sided paired test over problems. Power and numbers of problems use the normal approximation, smallest effects the
    t distribution, as in a comparison's report."""
    if not effects or not all(0 < abs(effect) <= 1 for effect in effects):
        raise ValueError(f"effects must be shares in (0, 1], got {list(effects)}: 0.05 is 5 points")
    if not samples or min(samples) < 1 or not problems or min(problems) < 2:
        raise ValueError(f"expected samples >= 1 and problems >= 2, got {list(samples)} and {list(problems)}")
    if not alpha < target_power < 1 or not 0 < alpha < 1:
        raise ValueError(f"expected 0 < alpha < power < 1, got alpha {alpha} and power {target_power}")
    noise, variance = assumptions.noise, assumptions.effect_sd**2
    return PowerPlan(
        assumptions=assumptions,
        target_power=target_power,
        alpha=alpha,
        effects=tuple(effects),
        samples=tuple(samples),
        problems=tuple(problems),
        needed=tuple(
            tuple(problems_needed(effect, k, variance, noise, target_power, alpha) for effect in effects)
            for k in samples
        ),
        detectable=tuple(
            tuple(detectable_effect(difference_se(n, k, variance, noise), n - 1, target_power, alpha) for n in problems)
            for k in samples
        ),
        power=tuple(
            tuple(tuple(power(effect, n, k, variance, noise, alpha) for n in problems) for k in samples)
            for effect in effects
        ),
        samples_needed=tuple(
            tuple(samples_needed(effect, n, variance, noise, target_power, alpha) for n in problems)
            for effect in effects
        ),
    )
