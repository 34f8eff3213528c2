"""What a verdict can show: its power at a true effect, the smallest effect that it shows, and how much shown effects exaggerate.

A verdict needs more than its t test. With one sample a problem it is the exact McNemar test, otherwise the t test AND the sign-flip
test, each at the first threshold of Holm's procedure, alpha / number of comparisons. The power here is that of this decision: exact
for McNemar, simulated for the other two, with the noise of the run at hand.

What is assumed of a true effect: that it adds the same to the rate of every problem, as far as 0 and 1 allow (`moved`), the rates being
spread as a Beta distribution with the accuracy of the run and its noise. So the noise of sampling changes with it (`Sampling`), and with
one sample the share that changes (`changed_more`). With several it sits in the units (problems, or clusters of them) that change, as many as in the run and
a share of its size more. Where the effect is larger than that share, all units that change have gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

ENUMERATED = 12
"""Units that changed up to which the sign-flip test goes through every pattern of signs."""
_LARGEST = 6
_STEPS_S = np.linspace(-1, 1, 401)
LARGE = 60
"""Units that changed above which the t and the sign-flip test are one: the t test's power is taken, nothing is simulated."""

Array = NDArray[np.float64]


class Decision(NamedTuple):
    """What happens to runs with one true effect."""

    power: float
    """Share of runs that show it, in its own direction."""
    exaggeration: float
    """Mean effect in the runs that show it / true effect; 1 where none does."""


Decide = Callable[[float], Decision]
"""A true effect (a positive share: 0.05 is 5 points) -> what its verdicts say."""


def least_units(alpha: float) -> int:
    """The least number of changed units with which any exact test of level ``alpha`` can show something: 2 * 0.5^units < alpha.

    >>> least_units(0.05), least_units(0.05 / 3), least_units(0.05 / 8)
    (6, 7, 9)
    """
    return math.floor(math.log2(2 / alpha)) + 1


def single_samples(num_units: int, changed: ArrayLike, accuracy: float | None = None, alpha: float = 0.05) -> Decide:
    """One sample a problem: the exact McNemar test over ``num_units`` problems, of which a share ``changed`` changes without an effect.

    ``changed`` may be several equally likely shares. ``accuracy``: of the baseline, for gains; 1 - accuracy for losses; where it is not
    known, the share stays. Exact.
    """
    shares = np.atleast_1d(np.asarray(changed, dtype=np.float64)).tolist()

    def decide(effect: float) -> Decision:
        after = [share + (0.0 if accuracy is None else changed_more(accuracy, share)(effect)) for share in shares]
        each = [_mcnemar(num_units, min(1.0, max(share, effect)), effect, alpha) for share in after]
        power, mean = (float(column.mean()) for column in np.array(each).T)
        return Decision(power, mean / power / effect if power > 1e-9 else 1.0)

    return decide


def spread(accuracy: float, noise: float) -> Array:
    """Rates of problems, 200 quantiles of the Beta distribution with mean ``accuracy`` and E[r (1 - r)] = ``noise``; all alike where no
    such distribution has as much noise.

    >>> rates = spread(0.6, 0.16)
    >>> print(rates.mean().round(2), (rates * (1 - rates)).mean().round(2))
    0.6 0.16
    """
    most = accuracy * (1 - accuracy)
    if noise >= 0.999 * most:
        return np.full(200, accuracy)
    size = max(noise, 1e-3 * most) / (most - noise)
    return np.asarray(scipy.stats.beta.ppf((np.arange(200) + 0.5) / 200, accuracy * size, (1 - accuracy) * size))


def moved(rates: Array, effect: float) -> Array:
    """The rates with the same added to each, as far as 0 and 1 allow, so that their mean moves by ``effect``."""
    means_S = np.clip(rates + _STEPS_S[:, None], 0, 1).mean(1) - rates.mean()
    return np.clip(rates + float(np.interp(effect, means_S, _STEPS_S)), 0, 1)


@lru_cache(maxsize=256)
def changed_more(accuracy: float, changed: float) -> Callable[[float], float]:
    """By how much an effect raises the share of problems that change, with one sample each."""
    rates = spread(accuracy, changed / 2)
    moved_SP = np.clip(rates + _STEPS_S[:, None], 0, 1) - rates
    means_S, more_S = moved_SP.mean(1), (moved_SP * (1 - 2 * rates)).mean(1)
    return lambda effect: float(np.interp(effect, means_S, more_S))


def _mcnemar(num_units: int, share: float, effect: float, alpha: float) -> tuple[float, float]:
    """(power, mean difference where it is shown and 0 elsewhere), if ``share`` of the units change and gains exceed losses by effect."""
    centre, spread = num_units * share, math.sqrt(num_units * share * (1 - share))
    numbers = np.arange(
        max(0, math.floor(centre - 9 * spread - 9)), min(num_units, math.ceil(centre + 9 * spread + 9)) + 1
    )
    chance_N = scipy.stats.binom.pmf(numbers, num_units, share)
    needed_N = scipy.stats.binom.isf(alpha / 2, numbers, 0.5) + 1  # the least number of gains that is significant
    gain = (share + effect) / (2 * share)
    hit_N = scipy.stats.binom.sf(needed_N - 1, numbers, gain)
    # E[gains; gains >= c] = N gain P(Bin(N - 1, gain) >= c - 1)
    gains_N = numbers * gain * scipy.stats.binom.sf(needed_N - 2, np.maximum(numbers - 1, 0), gain)
    gains_N = np.where(numbers > 0, gains_N, 0.0)
    return float(chance_N @ hit_N), float(chance_N @ (2 * gains_N - numbers * hit_N)) / num_units


class Sampling(NamedTuple):
    """The noise of sampling answers in the differences of a run: what an effect makes of it. Estimated from the run itself."""

    part: float
    """Its share of the variance of the differences, over problems."""
    rates: Array
    """Of problems, `spread`."""

    @classmethod
    def of(cls, a: ArrayLike, b: ArrayLike, k: int) -> Sampling:
        """``a``, ``b``: rates of the problems in both arms, from ``k`` > 1 samples each."""
        rates = np.asarray([a, b], dtype=np.float64)
        noise = float((rates * (1 - rates)).mean()) * k / (k - 1)  # without bias
        of_differences = float(np.var(rates[1] - rates[0], ddof=1))
        part = min(1.0, 2 * noise / k / of_differences) if of_differences > 0 else 0.0
        return cls(part, spread(float(rates.mean()), noise))

    def factor(self, effect: float) -> float:
        """What becomes of the standard error when one of both arms moves by ``effect`` (a loss: below 0)."""
        before, after = ((rates * (1 - rates)).mean() for rates in (self.rates, moved(self.rates, effect)))
        return math.sqrt(1 - self.part / 2 * (1 - float(after / before))) if before > 0 else 1.0


def many_samples(
    num_units: int,
    values: ArrayLike,
    changed: float,
    se: float,
    alpha: float = 0.05,
    most: float = 1.0,
    sampling: Sampling | None = None,
    sign: int = 1,
    half: float = 0.0,
) -> Decide:
    """Several samples a problem, or clusters: t test and sign-flip test over ``num_units`` units.

    ``values``: the differences of units that changed (any scale and centre, the spread is drawn from them), ``changed``: their share,
    ``se``: the standard error of the mean difference. ``most``: the largest difference of one unit: an effect makes a
    share effect / most of the units change beside those that do without it. ``sampling``: what the effect makes of the noise; without
    it nothing. ``sign``: of the effect, for that. ``half``: half a step of sums with flipped signs. The sign-flip test counts the sum seen,
    and the sums here are drawn without steps.
    """
    noise = sampling or Sampling(0.0, np.full(1, 0.5))
    if num_units * changed > LARGE:
        return _normal(num_units, changed, se, alpha, noise, sign, half)
    runs, random = max(1000, min(2000, 200_000 // num_units)), np.random.default_rng(0)
    place_RU = random.random((runs, num_units))
    shape = np.sort(np.asarray(values, dtype=np.float64))  # sorted: the order of problems changes nothing
    drawn_RU = random.choice(shape - shape.mean(), (runs, num_units)) * (place_RU < changed)
    # The draws have the run's own standard error: their spread in all units is se * sqrt(units).
    spread = math.sqrt(float(shape.var()) * changed)
    drawn_RU *= se * math.sqrt(num_units) / spread if spread > 0 else 0.0
    border = float(scipy.stats.t.ppf(1 - alpha / 2, num_units - 1))

    def decide(effect: float) -> Decision:
        share = min(1.0, changed + effect / most)
        values_RU = drawn_RU * noise.factor(sign * effect) + (effect / share) * (place_RU < share)
        mean_R = values_RU.mean(1)
        square_R = np.einsum("ru,ru->r", values_RU, values_RU) / num_units - mean_R**2
        shown_R = mean_R * math.sqrt(num_units - 1) > border * np.sqrt(np.maximum(square_R, 0))
        sums_R = np.maximum(mean_R * num_units - half, 0)
        # Hoeffding: p <= 2 exp(-sum^2 / 2 sum of squares); runs where this is below alpha need no closer look.
        unsure_R = shown_R & (sums_R**2 <= 2 * math.log(2 / alpha) * (square_R + mean_R**2) * num_units)
        shown_R[unsure_R] = flip_p(values_RU[unsure_R], half) < alpha
        power = float(shown_R.mean())
        return Decision(power, float(mean_R[shown_R].mean()) / effect if power else 1.0)

    return decide


def _normal(num_units: int, changed: float, se: float, alpha: float, noise: Sampling, sign: int, half: float) -> Decide:
    """The t test with many units, effects up to 1. One that sits in a share of the units adds to their spread."""
    border = float(scipy.stats.t.ppf(1 - alpha / 2, num_units - 1))

    def decide(effect: float) -> Decision:
        share = min(1.0, changed + effect) if changed < 1 else 1.0
        own = math.sqrt((se * noise.factor(sign * effect)) ** 2 + effect**2 * (1 / share - 1) / num_units)
        if own == 0:
            return Decision(1.0, 1.0)
        z = border - (effect - half / num_units) / own
        power = float(scipy.stats.norm.sf(z))
        return Decision(power, 1 + own * float(scipy.stats.norm.pdf(z)) / max(power, 1e-12) / effect)

    return decide


def smallest_effect(decide: Decide, target_power: float = 0.8, start: float = 0.1, most: float = 1.0) -> float:
    """The smallest true effect up to ``most`` and 100 ``start`` (a guess) that is shown with this power, to .5%; infinite where none is."""
    low, high, most = 0.0, min(start, most), min(most, 100 * start)
    while decide(high).power < target_power:
        if high >= most:
            return math.inf
        low, high = high, min(1.3 * high, most)
    low = max(low, high / 4) if decide(high / 4).power < target_power else low
    while high - low > 5e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if decide(middle).power >= target_power else (middle, high)
    return high


@lru_cache(maxsize=1024)
def planned_effect(num: int, changed: float, alpha: float, target_power: float, variance: float, k: float) -> float:
    """``smallest_effect`` for plans, where no run is at hand; infinite below ``least_units``."""
    if round(num * changed) < least_units(alpha):
        return math.inf
    decide = planned_decision(num, changed, alpha, variance, k)
    return smallest_effect(decide, target_power, 3 * math.sqrt(variance / num), most=math.inf)


@lru_cache(maxsize=8)
def planned_decision(num: int, changed: float, alpha: float, variance: float, k: float) -> Decide:
    """The decision for ``num`` normal differences with this variance, of shares of ``k`` samples."""
    shape = scipy.stats.norm.ppf((np.arange(200) + 0.5) / 200)
    return many_samples(num, shape, changed, math.sqrt(variance / num), alpha, most=math.inf, half=1 / k)


def flip_p(values_RU: Array, half: float = 0.0) -> Array:
    """Two-sided p of the sign-flip test of every row: over all patterns of signs where few units changed, else over those of the
    largest units, the sum of all others taken as normal (within .003 where the values are not a few whole numbers)."""
    sizes_RU = -np.sort(-np.abs(values_RU), axis=1)
    seen_R = np.abs(values_RU.sum(1)) * (1 - 1e-12) - 1e-12 - half
    few_R = np.count_nonzero(values_RU, axis=1) <= ENUMERATED
    p_R = np.ones(len(values_RU))
    if few_R.any():
        sums_RX = np.abs(_signed_sums(sizes_RU[few_R, :ENUMERATED]))
        p_R[few_R] = (sums_RX >= seen_R[few_R, None]).mean(1)
    if not few_R.all():
        sums_RX = _signed_sums(sizes_RU[~few_R, :_LARGEST])
        rest_R1 = np.sqrt((sizes_RU[~few_R, _LARGEST:] ** 2).sum(1, keepdims=True))
        seen_R1 = seen_R[~few_R, None]
        p_R[~few_R] = (
            scipy.special.ndtr((sums_RX - seen_R1) / rest_R1) + scipy.special.ndtr((-sums_RX - seen_R1) / rest_R1)
        ).mean(1)
    return p_R


def _signed_sums(sizes_RU: Array) -> Array:
    """Over all patterns of signs X with a plus at the last unit: the others are their mirror images."""
    units = sizes_RU.shape[1]
    patterns_XU = 1.0 - 2.0 * ((np.arange(2 ** (units - 1))[:, None] >> np.arange(units)) & 1)
    return np.asarray(sizes_RU @ patterns_XU.T)


class Detection(NamedTuple):
    """What one run's verdict could show."""

    smallest: float | None
    """Smallest true effect that is shown with 80% power; above 1 where none is; None where too few units changed, or all alike."""
    at_mean: Decision | None
    """If the true effect is the one found; None without a difference."""


def detection(
    differences_U: Array,
    mean: float,
    se: float,
    alpha: float,
    single_accuracy: float | None = None,
    sampling: Sampling | None = None,
    half: float = 0.0,
) -> Detection:
    """For the differences of the units: problems, or sums over clusters. ``single_accuracy``: of the first arm, given where there is one
    sample a problem and no clusters; ``sampling``: where there are several. The smallest effect is a gain, unless the run points to a
    loss by more than its standard error."""
    moved = differences_U[differences_U != 0]
    num = len(differences_U)
    if len(moved) < least_units(alpha) or (se == 0 and single_accuracy is None):
        return Detection(None, None)
    changed = len(moved) / num
    if single_accuracy is None:
        gain, loss = (many_samples(num, moved, changed, se, alpha, 1.0, sampling, sign, half) for sign in (1, -1))
        found, expected = gain if mean >= 0 else loss, loss if mean < -se else gain
    else:
        rate = single_accuracy if mean >= 0 else 1 - single_accuracy
        without = min(1.0, max(0.0, changed - changed_more(rate, changed)(abs(mean))))
        # The run knows this share from its own problems alone: its posterior, at equally likely places (Jeffreys' prior).
        shares = scipy.stats.beta.ppf((np.arange(5) + 0.5) / 5, num * without + 0.5, num * (1 - without) + 0.5)
        found = single_samples(num, shares, rate, alpha)
        expected = found if mean >= 0 or mean < -se else single_samples(num, shares, single_accuracy, alpha)
    smallest = smallest_effect(expected, start=max(3 * se, 1 / num))
    return Detection(min(smallest, 2.0), found(abs(mean)) if mean else None)
