from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reasoning_evals.comparing.power import sampling_noise, variance_parts
from reasoning_evals.comparing.resampling import bootstrap_interval, sign_flip_p
from reasoning_evals.comparing.statistics import (
    holm,
    majority_correct,
    mcnemar_p,
    mean_estimate,
    paired_difference,
    pass_at_k,
    proportion_estimate,
    wilson_interval,
)

RANDOM = np.random.default_rng(0)


def simulate(
    random: np.random.Generator, n: int, k: int, effect: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correct answers of two arms: base rates Beta(.7, .3), true effects with the given mean and spread where they fit."""
    base = random.beta(0.7, 0.3, n)
    shifted = np.clip(base + random.normal(effect, spread, n), 0, 1)
    return random.random((n, k)) < base[:, None], random.random((n, k)) < shifted[:, None]


def test_mean_estimate_equals_scipy() -> None:
    values = RANDOM.normal(3, 2, 41)
    ours = mean_estimate(values)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.se == pytest.approx(stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high))
    assert (ours.df, ours.num_problems) == (40, 41)


def test_clustered_se_equals_the_double_sum() -> None:
    """Miller (2411.00640), eq. 4: sum over pairs of one cluster of the products of residuals, with the G/(G-1) correction."""
    values = RANDOM.normal(0, 1, 30)
    clusters = [f"c{i}" for i in RANDOM.integers(0, 7, 30)]
    ours = mean_estimate(values, clusters)
    residual = values - values.mean()
    total = sum(residual[i] * residual[j] for i in range(30) for j in range(30) if clusters[i] == clusters[j])
    groups = len(set(clusters))
    assert ours.se == pytest.approx(math.sqrt(total * groups / (groups - 1)) / 30)
    assert ours.df == groups - 1


def test_clusters_of_one_are_no_clusters() -> None:
    values = RANDOM.normal(0, 1, 12)
    assert mean_estimate(values, list(range(12))) == pytest.approx(mean_estimate(values))
    assert bootstrap_interval(values, list(range(12))) == pytest.approx(bootstrap_interval(values))


def test_copies_of_a_problem_in_a_cluster_add_nothing() -> None:
    values = RANDOM.normal(0, 1, 10)
    once = mean_estimate(values)
    thrice = mean_estimate(np.repeat(values, 3), np.repeat(np.arange(10), 3).tolist())
    assert (thrice.mean, thrice.se) == pytest.approx((once.mean, once.se))


def test_paired_difference_equals_scipys_paired_t_test() -> None:
    a, b = RANDOM.random(25), RANDOM.random(25)
    ours = paired_difference(a, b)
    reference = stats.ttest_rel(b, a)
    interval = reference.confidence_interval(0.95)
    assert ours.p_value == pytest.approx(reference.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert ours.detectable is None, "no verdict, no effect that it could show"
    assert ours.num_clusters is None


def test_bootstrap_agrees_with_scipys() -> None:
    values = RANDOM.exponential(1, 40)
    ours = bootstrap_interval(values, num_resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_cluster_bootstrap_agrees_with_a_plain_loop() -> None:
    values, clusters = RANDOM.normal(0, 1, 40), (np.arange(40) // 5).tolist()
    ours = bootstrap_interval(values, clusters, num_resamples=20_000)
    random = np.random.default_rng(5)
    means = []
    for _ in range(20_000):
        chosen = random.integers(0, 8, 8)
        means.append(np.concatenate([values[5 * c : 5 * c + 5] for c in chosen]).mean())
    assert (ours.low, ours.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_exact_sign_flip_equals_enumeration(quarters: list[int]) -> None:
    seen = abs(sum(quarters))
    patterns = list(itertools.product((-1, 1), repeat=len(quarters)))
    hits = sum(abs(sum(s * q for s, q in zip(signs, quarters, strict=True))) >= seen for signs in patterns)
    assert sign_flip_p(np.array(quarters) / 4, denominator=4) == pytest.approx(hits / len(patterns))


def test_exact_sign_flip_equals_scipys_permutation_test() -> None:
    a, b = RANDOM.integers(0, 5, 12) / 4, RANDOM.integers(0, 5, 12) / 4
    theirs = stats.permutation_test((b, a), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=np.inf)
    assert paired_difference(a, b, denominator=4).sign_flip_p == pytest.approx(theirs.pvalue)


def test_random_sign_flip_is_near_the_exact_one() -> None:
    values = RANDOM.integers(-8, 12, 60) / 8
    exact, random = sign_flip_p(values, denominator=8), sign_flip_p(values)
    assert random == pytest.approx(exact, abs=0.01)


def test_sign_flip_of_one_sample_a_problem_is_mcnemar() -> None:
    for gained, lost in [(3, 0), (5, 0), (6, 0), (9, 4), (0, 0), (7, 7)]:
        differences = [1] * gained + [-1] * lost + [0] * 10
        assert sign_flip_p(differences, denominator=1) == pytest.approx(mcnemar_p(gained, lost))
    assert mcnemar_p(3, 0) == pytest.approx(0.25)
    assert mcnemar_p(5, 0) == pytest.approx(0.0625)
    assert mcnemar_p(6, 0) == pytest.approx(0.03125)


def test_published_22_against_25_of_30_shows_nothing() -> None:
    """RICE's AIME24 result: even if the same 22 were solved again, 3 gained and none lost is p = .25; unpaired it is .53."""
    a = np.array([1.0] * 22 + [0.0] * 8)
    b = np.array([1.0] * 25 + [0.0] * 5)
    assert stats.fisher_exact([[22, 8], [25, 5]]).pvalue == pytest.approx(0.53, abs=0.01)
    best = paired_difference(a, b, denominator=1)
    assert best.sign_flip_p == pytest.approx(0.25)
    assert best.p_value > 0.05
    assert best.low < 0 < best.mean
    best = paired_difference(a, b, denominator=1, level=0.05)
    assert (best.num_changed, best.detectable) == (3, None), "McNemar's test needs six: 3-0 can show nothing"
    worst = paired_difference(a, np.r_[np.zeros(5), np.ones(25)], denominator=1, level=0.05)
    assert worst.num_changed == 13
    assert 0.2 < worst.detectable < 0.4  # type: ignore[operator]


def test_equal_arms_give_no_difference_and_no_detectable_effect() -> None:
    a = RANDOM.integers(0, 5, 20) / 4
    same = paired_difference(a, a, denominator=4)
    assert (same.mean, same.se, same.p_value, same.sign_flip_p, same.detectable) == (0, 0, 1, 1, None)


def test_an_equal_shift_of_every_problem_leaves_the_permutation_test() -> None:
    a = np.array([0.1, 0.3, 0.5, 0.2, 0.4, 0.6])
    shifted = paired_difference(a, a + 0.25, denominator=20)
    assert (shifted.se, shifted.p_value) == (0, 2 / 2**6)


def test_wilson_equals_scipys_and_is_exact_at_the_ends() -> None:
    for successes, num in [(0, 5), (3, 7), (22, 30), (30, 30)]:
        reference = stats.binomtest(successes, num).proportion_ci(method="wilson")
        assert wilson_interval(successes, num) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert wilson_interval(0, 5).low == 0.0
    assert wilson_interval(5, 5).high == 1.0


def test_proportions_stay_in_range() -> None:
    assert proportion_estimate([1.0] * 9)[2:4] == pytest.approx(wilson_interval(9, 9))
    few = proportion_estimate([1, 1, 1, 0.75, 1])
    assert 0.5 < few.low < 0.95 < few.high < 1.0
    assert (proportion_estimate([1, 0], ["a", "b"]).low, proportion_estimate([0.75, 0.25]).high) < (0.01, 1.0)
    same = proportion_estimate([0.5] * 6)
    assert same[2:4] == pytest.approx(wilson_interval(3, 6)), "no spread seen is no certainty"


@pytest.mark.parametrize(
    ("num", "k", "hard", "rate"), [(100, 4, 0.2, 0.9), (100, 2, 0.05, 0.5), (30, 16, 0.1, 0.8), (10, 4, 0.1, 0.5)]
)
def test_the_interval_of_a_share_near_one_covers_it(num: int, k: int, hard: float, rate: float) -> None:
    """Some problems are hard, the others always solved. The t interval covers the mean in 87% to 90% of the first three."""
    random, runs = np.random.default_rng(0), 1000
    true = 1 - hard * (1 - rate)
    shares = random.binomial(k, np.where(random.random((runs, num)) < hard, rate, 1.0)) / k
    found = [proportion_estimate(row) for row in shares]
    assert sum(one.low <= true <= one.high for one in found) / runs > 0.925


@pytest.mark.parametrize("num_clusters", [4, 8, 30])
def test_the_interval_of_a_share_over_clusters_covers_it(num_clusters: int) -> None:
    random, runs, hits = np.random.default_rng(1), 400, 0
    for _ in range(runs):
        names = np.repeat(np.arange(num_clusters), random.integers(1, 7, num_clusters))
        rates = random.beta(6, 0.5, num_clusters)
        found = proportion_estimate(random.binomial(1, rates[names]).astype(float), names.tolist())
        hits += found.low <= 6 / 6.5 <= found.high
    assert hits / runs > 0.91


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_clusters_that_all_agree_keep_an_interval(value: float) -> None:
    found = proportion_estimate([value] * 6, ["a", "a", "b", "b", "c", "c"])
    assert found[2:4] == pytest.approx(wilson_interval(3 * value, 3))  # 3 clusters, not 6 problems
    assert found.high - found.low > 0.5


def test_a_difference_of_which_few_changed_reckons_with_changes_not_met() -> None:
    few, many = np.zeros(240), np.zeros(240)
    few[:3], many[:150] = 0.25, 0.25
    found = paired_difference(np.zeros(240), few, denominator=4, limit=1.0)
    assert found.low < 0 < found.mean < found.high, "3 gains of 240, which no test shows"
    assert found.low > -0.01, "a loss is not thought larger than the largest change seen"
    mirrored = paired_difference(few, np.zeros(240), denominator=4, limit=1.0)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    plain = paired_difference(np.zeros(240), many, denominator=4, limit=1.0)
    assert (plain.low, plain.high) == pytest.approx(mean_estimate(many)[2:4]), "many changed: Student's t"
    tokens = paired_difference(np.zeros(240), few)
    assert (tokens.low, tokens.high) == pytest.approx(mean_estimate(few)[2:4]), "not shares: Student's t"


def test_a_difference_of_shares_stays_possible() -> None:
    free = paired_difference([1, 1, 0], [0, 0, 0], denominator=1)
    kept = paired_difference([1, 1, 0], [0, 0, 0], denominator=1, limit=1.0)
    assert free.low < -1
    assert (kept.low, kept.high, kept.se, kept.p_value) == (-1, free.high, free.se, free.p_value)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.data())
def test_pass_at_k_equals_enumeration(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_vote() -> None:
    assert majority_correct([], []) == 0
    assert majority_correct([None, None], [False, False]) == 0
    assert majority_correct(["7", "8", "7", None], [False, True, False, False]) == 0
    assert majority_correct(["7", "8", "9"], [False, True, False]) == pytest.approx(1 / 3)


def test_holm_equals_scipy_style_reference_and_keeps_order() -> None:
    values = [0.04, 0.001, 0.2, 0.03]
    assert holm(values) == pytest.approx([0.09, 0.004, 0.2, 0.09])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_estimate([1.0]), "an interval needs at least 2 problems, got 1"),
        (lambda: mean_estimate([1.0, 2.0], ["c", "c"]), "at least 2 clusters, got 1"),
        (lambda: mean_estimate([1.0, math.nan]), "expected one finite number a problem"),
        (lambda: mean_estimate([1.0, 2.0], ["c"]), "1 cluster ids for 2 problems"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "needs the same problems on both sides, got 2 and 3"),
        (lambda: sign_flip_p([0.3, 0.5], denominator=2), "not fractions of 2"),
        (lambda: pass_at_k(4, 1, 5), "expected correct <= samples and k <= samples"),
        (lambda: wilson_interval(3, 2), "expected 0 <= successes <= trials"),
        (lambda: majority_correct(["1"], []), "1 answers and 0 verdicts"),
        (lambda: variance_parts([[1], [0]], [[1], [0]]), "with one sample a problem"),
        (lambda: sampling_noise([1, 0]), "expected a table problems x samples"),
    ],
)
def test_refusals_say_value_and_expectation(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        call()


def test_variance_parts_are_unbiased_and_add_up() -> None:
    random, n, k = np.random.default_rng(3), 200, 4
    parts, variances = [], []
    for _ in range(200):
        base = random.beta(2, 2, n)
        effect = random.uniform(-0.1, 0.1, n)
        shifted = np.clip(base + effect, 0, 1)
        a, b = random.random((n, k)) < base[:, None], random.random((n, k)) < shifted[:, None]
        parts.append(variance_parts(a, b))
        variances.append((shifted - base).var())
    mean = np.mean(parts, axis=0)
    assert mean[0] == pytest.approx(np.mean(variances), abs=0.0008)
    assert mean[1] == pytest.approx(0.2, abs=0.003)  # E p(1-p) of Beta(2, 2)
    assert sampling_noise(a) == pytest.approx(parts[-1].noise_a)
    observed = (b.mean(1) - a.mean(1)).std(ddof=1) / math.sqrt(n)
    assert math.sqrt((parts[-1].effect_variance + parts[-1].noise / k) / n) == pytest.approx(observed)
    assert mean[3] == pytest.approx(0, abs=0.002), "independent samples share nothing"


def check_error_rate_and_coverage(num_simulations: int, sizes: list[tuple[int, int]], slack: float) -> None:
    """Under no mean difference (effects with spread .05 around 0): type I error, and coverage of t and bootstrap intervals."""
    random = np.random.default_rng(11)
    wrong, covered, bootstrap_covered = 0, 0, 0
    for index in range(num_simulations):
        n, k = sizes[index % len(sizes)]
        a, b = simulate(random, n, k, 0.0, 0.0)
        found = paired_difference(a.mean(1), b.mean(1), denominator=k, num_resamples=400)
        wrong += found.p_value < 0.05
        a, b = simulate(random, n, k, 0.05, 0.05)
        found = paired_difference(a.mean(1), b.mean(1), denominator=k, num_resamples=400)
        truth = _mean_effect()
        covered += found.low <= truth <= found.high
        bootstrap_covered += found.bootstrap_low <= truth <= found.bootstrap_high
    assert 0.05 - 0.015 - slack <= wrong / num_simulations <= 0.05 + 0.015 + slack
    assert 0.95 - 0.015 - slack <= covered / num_simulations <= 0.95 + 0.015 + slack
    assert bootstrap_covered / num_simulations >= 0.92 - slack


_EFFECT: list[float] = []


def _mean_effect() -> float:
    """The population mean of the clipped effect that ``simulate`` draws from."""
    if not _EFFECT:
        random = np.random.default_rng(99)
        base = random.beta(0.7, 0.3, 4_000_000)
        _EFFECT.append(float((np.clip(base + random.normal(0.05, 0.05, len(base)), 0, 1) - base).mean()))
    return _EFFECT[0]


SIZES = [(n, k) for n in (30, 60, 198, 500) for k in (1, 4, 16)]


def test_error_rate_and_coverage_small() -> None:
    check_error_rate_and_coverage(360, SIZES, slack=0.025)


@pytest.mark.slow
def test_error_rate_and_coverage_of_2000_comparisons() -> None:
    check_error_rate_and_coverage(2000, SIZES, slack=0.0)
