"""Verdicts in worlds where the truth is known; each claim stands beside the rule that it replaced, which fails in the same world.

The long form, with the numbers that a reader may quote, is tests/bench/verdicts.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reasoning_evals.comparing.detection import (
    Sampling,
    changed_more,
    flip_p,
    least_units,
    many_samples,
    single_samples,
    smallest_effect,
)
from reasoning_evals.comparing.pairing import mean_length, paired_log_ratio
from reasoning_evals.comparing.resampling import sign_flip_p
from reasoning_evals.comparing.statistics import PairedDifference, mcnemar_p, mean_estimate, paired_difference
from verdict_worlds import (
    HARD,
    SETTLED,
    Lengths,
    called_held,
    covered_lengths,
    family_wise_error,
    found,
    one_pair,
    own_p,
    power_at_the_named_effect,
    se,
    shifted,
)


def test_eight_arms_without_an_effect_seldom_show_one() -> None:
    runs = 60
    error, _ = family_wise_error(30, 8, 8, runs, seed=1)
    alone, _ = family_wise_error(30, 8, 8, runs, seed=1, judge=lambda p_values: p_values)
    assert error <= 0.05 + 2 * se(0.05, runs)
    assert alone > 0.05 + 2 * se(0.05, runs), "each pair's own p would have called one of five runs an effect"


def test_one_pair_keeps_its_level_and_coverage() -> None:
    runs = 150
    error, coverage = one_pair(30, 16, runs, seed=2)
    assert error <= 0.05 + 2 * se(0.05, runs)
    assert coverage >= 0.95 - 2 * se(0.05, runs)


def test_the_named_effect_is_shown_four_times_in_five() -> None:
    """30 problems, one sample: the t test's formula named an effect that the exact test shows in 63%."""
    runs = 140
    ours = power_at_the_named_effect(30, 1, runs, seed=3, shape=HARD)
    old = power_at_the_named_effect(30, 1, runs, seed=3, named=t_formula, shape=HARD)
    assert 0.75 - 2 * se(0.8, runs) <= ours <= 0.85 + 2 * se(0.8, runs)
    assert old < 0.75 - 2 * se(0.8, runs)


def t_formula(difference: PairedDifference) -> float | None:
    factor = stats.t.ppf(0.975, difference.df) + stats.t.ppf(0.8, difference.df)
    return None if difference.se == 0 else float(factor * difference.se)


def test_held_is_seldom_said_of_three_points_lost() -> None:
    """One problem of 33 is lost outright: a run that met none of them sees a sliver of an interval."""
    runs = 200
    for num, k in ((30, 4), (100, 4)):
        assert called_held(num, k, 0.03, 1.0, runs, seed=4) <= 0.05 + 2 * se(0.05, runs)
        old = called_held(num, k, 0.03, 1.0, runs, seed=4, noise=0.0, low=t_low)
        assert old > 0.05 + 2 * se(0.05, runs)


def t_low(found: PairedDifference) -> float:
    return found.mean - float(stats.t.ppf(0.975, found.df)) * found.se


@pytest.mark.parametrize(("num", "k", "gain", "rate"), [(240, 4, 0.02, 1.0), (100, 1, 0.05, 1.0), (240, 4, 0.05, 0.2)])
def test_a_difference_of_which_few_changed_is_covered(num: int, k: int, gain: float, rate: float) -> None:
    """Some problems gain ``rate``, the others nothing: of the runs that have an interval."""
    random, runs, ours, old = np.random.default_rng(6), 250, 0, 0
    true = gain * rate
    for _ in range(runs):
        after = np.zeros(num)
        while not after.any():
            after = random.binomial(k, np.where(random.random(num) < gain, rate, 0.0)) / k
        found = paired_difference(np.zeros(num), after, denominator=k, num_resamples=1, limit=1.0)
        ours += found.low <= true <= found.high
        old += t_low(found) <= true <= 2 * found.mean - t_low(found)
    assert ours / runs >= 0.95 - 2 * se(0.05, runs)
    assert old / runs < 0.95 - 2 * se(0.05, runs)


def test_equal_arms_whose_samples_may_loop_seldom_differ_in_length() -> None:
    """One sample in 20 runs to a limit of 32 times the others: a t test alone calls 9% of such arms different."""
    random, runs = np.random.default_rng(7), 300
    lengths = np.where(random.random((runs, 2, 30)) < 0.05, 32.0, np.exp(random.normal(0, 0.7, (runs, 2, 30))))
    shown = sum(paired_log_ratio(a, b).p_value < 0.05 for a, b in lengths)
    assert shown / runs <= 0.05 + 2 * se(0.05, runs)


def test_the_mean_of_skewed_lengths_is_covered() -> None:
    random, runs, ours, old = np.random.default_rng(8), 400, 0, 0
    for tokens in np.exp(random.normal(0, 1.3, (runs, 30))):
        found, plain = mean_length(tokens), mean_estimate(tokens)
        ours += found.low <= np.exp(1.3**2 / 2) <= found.high
        old += plain.low <= np.exp(1.3**2 / 2) <= plain.high
    assert ours / runs > 0.87 > old / runs
    few = mean_length([0.0, 0.0, 55.0])
    assert (few.low, few.high) == (0.0, mean_estimate([0.0, 0.0, 55.0]).high), "too few for a logarithm"
    assert mean_length([0.0, 0.0]) == mean_length([0.0, 0.0], ["a", "b"])


@pytest.mark.parametrize(("clusters", "size"), [(10, 4), (30, 1)])
def test_skewed_and_clustered_lengths_are_covered(clusters: int, size: int) -> None:
    runs = 600
    ours = covered_lengths(clusters, size, 1.3, runs, seed=5)
    old = covered_lengths(clusters, size, 1.3, runs, seed=5, interval=linearised)
    assert 0.93 - 2 * se(0.05, runs) <= ours <= 0.97 + 2 * se(0.05, runs)
    assert old < 0.93 - 2 * se(0.05, runs)


def linearised(lengths: Lengths) -> tuple[float, float]:
    """The interval before: problems as units, the ratio itself, the linearised variance."""
    a, b = np.array(lengths[0]), np.array(lengths[1])
    ratio, num = b.mean() / a.mean(), len(a)
    half = stats.t.ppf(0.975, num - 1) * (b - ratio * a).std(ddof=1) / np.sqrt(num) / a.mean()
    return ratio - half, ratio + half


def test_mcnemars_power_equals_a_plain_simulation() -> None:
    random = np.random.default_rng(6)
    effect, changed, n = 0.2, 0.3, 40
    decision = single_samples(n, changed, 0.5)(effect)
    after = changed + changed_more(0.5, changed)(effect)
    gains, losses, _ = random.multinomial(n, [(after + effect) / 2, (after - effect) / 2, 1 - after], 4000).T
    known = {(g, h): mcnemar_p(int(g), int(h)) for g, h in set(zip(gains.tolist(), losses.tolist(), strict=True))}
    p = np.array([known[pair] for pair in zip(gains.tolist(), losses.tolist(), strict=True)])
    shown = (p < 0.05) & (gains > losses)
    assert decision.power == pytest.approx(shown.mean(), abs=0.02)
    assert decision.exaggeration == pytest.approx((gains - losses)[shown].mean() / n / effect, rel=0.02)


def test_the_simulated_sign_flip_is_the_exact_one() -> None:
    random = np.random.default_rng(7)
    few = random.integers(-4, 5, (30, 9)) / 4
    assert flip_p(few) == pytest.approx([sign_flip_p(one, 4) for one in few], abs=1e-12)
    for many in (random.normal(0.4, 1, (20, 20)), random.exponential(1, (20, 15)) - 0.4):
        exact = np.array([sign_flip_p(one, num_permutations=40_000) for one in many])
        ours = flip_p(many)
        assert ours == pytest.approx(exact, abs=0.012)
        assert (exact < 0.06).sum() > 3
        assert ours[exact < 0.06] == pytest.approx(exact[exact < 0.06], abs=0.004)


def test_power_of_t_and_sign_flip_equals_a_plain_loop() -> None:
    random = np.random.default_rng(8)
    values = random.choice([-0.5, -0.25, 0.25, 0.5], 24)
    sd = 0.3
    decision = many_samples(24, values, 1.0, sd / np.sqrt(24))(0.2)
    shown = 0
    for _ in range(600):
        drawn = 0.2 + sd * random.choice(values - values.mean(), 24) / values.std()
        t = stats.ttest_1samp(drawn, 0).pvalue
        shown += drawn.mean() > 0 and max(t, sign_flip_p(drawn, num_permutations=499)) < 0.05
    assert decision.power == pytest.approx(shown / 600, abs=0.05)


@pytest.mark.parametrize(("n", "effect"), [(40, 0.22), (150, 0.11)])
def test_sums_of_few_values_cost_the_sign_flip_test(n: int, effect: float) -> None:
    """Two samples a problem: without the steps of the sums the power, and so the effect that a run names, is too good by 4 points."""
    random, runs, k = np.random.default_rng(9), 1500, 2
    a, b = random.binomial(k, 0.4, (runs, n)) / k, random.binomial(k, 0.4 + effect, (runs, n)) / k
    shown = np.mean([own_p(found(x, y, k), x, y, k) < 0.05 and y.mean() > x.mean() for x, y in zip(a, b, strict=True)])
    values = (b - a)[b != a]
    changed = float((a != b).mean())
    se = float(values.std()) * np.sqrt(changed / n)
    with_steps, without = (
        many_samples(n, values[:2000], changed, se, most=np.inf, half=half)(effect).power for half in (1 / k, 0.0)
    )
    assert with_steps == pytest.approx(shown, abs=0.03)
    assert without > shown + 0.015


@pytest.mark.parametrize("shape", [HARD, SETTLED])
def test_the_share_that_changes_is_that_of_runs_with_the_effect(shape: tuple[float, float]) -> None:
    rates = np.random.default_rng(1).beta(*shape, 50_000)
    after = shifted(rates, np.zeros(len(rates)), 0.15)
    shares = [float((rates * (1 - other) + other * (1 - rates)).mean()) for other in (rates, after)]
    more = changed_more(float(rates.mean()), shares[0])(0.15)
    assert more == pytest.approx(shares[1] - shares[0], abs=0.01)


@pytest.mark.parametrize("arms", [1, 3, 8])
def test_fewer_units_than_the_least_show_nothing(arms: int) -> None:
    least = least_units(0.05 / arms)
    assert sign_flip_p([1.0] * least, 1) < 0.05 / arms <= sign_flip_p([1.0] * (least - 1), 1)
    assert smallest_effect(single_samples(least - 1, 0.5, alpha=0.05 / arms)) == np.inf
    assert smallest_effect(single_samples(least, 0.5, alpha=0.05 / arms)) <= 1


def test_the_noise_of_an_arm_changes_with_its_rates() -> None:
    """What the run predicts of the standard error under an effect is what a run under that effect has."""
    random = np.random.default_rng(0)
    rates, k = random.beta(2.0, 1.5, 20_000), 4
    a, b = (random.binomial(k, rates) / k for _ in range(2))
    found = Sampling.of(a, b, k)
    assert np.mean(found.rates * (1 - found.rates)) == pytest.approx(np.mean(rates * (1 - rates)), rel=0.02)
    assert found.part == pytest.approx(1.0, abs=0.03)
    for effect in (0.17, -0.2):
        low, high = -1.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if np.clip(rates + middle, 0, 1).mean() - rates.mean() < effect else (low, middle)
            )
        moved = random.binomial(k, np.clip(rates + high, 0, 1)) / k
        ratio = np.std(moved - a) / np.std(b - a)
        assert found.factor(effect) == pytest.approx(ratio, abs=0.03)
        assert ratio < (0.97 if effect > 0 else 1.0)
    assert Sampling.of([0.0, 1.0], [0.0, 1.0], 4).factor(0.1) == 1.0
