"""Shorter thoughts and what they cost: ratios, verdicts, repetition."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.comparing.pairing import paired_log_ratio
from reasoning_evals.comparing.statistics import paired_difference
from reasoning_evals.comparing.token_use import efficiency, percent_change, thoughts_of
from reasoning_evals.runs.grading_pass import GradeRow

lengths = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 1e4)), min_size=2, max_size=40)


def rows_of(arm: str, tokens: list[int], correct: list[bool], k: int = 1) -> list[GradeRow]:
    base: dict[str, Any] = {"task": "t", "extracted": None, "reason": "", "method": "", "finish_reason": "stop"}
    return [
        GradeRow(
            arm=arm,
            problem_id=f"p{i // k:03}",
            sample_idx=i % k,
            outcome="correct" if right else "wrong",
            state="closed",
            thinking_tokens=number,
            answer_tokens=3,
            total_tokens=number + 4,
            **base,
        )
        for i, (number, right) in enumerate(zip(tokens, correct, strict=True))
    ]


def test_ratio_by_hand() -> None:
    """a = (10, 20, 30), b = (5, 15, 40): log ratios without one are log(55/50), log(45/40), log(20/30); log(60/60) = 0. Shares of
    tokens are 9/72, 21/72, 42/72."""
    found = paired_log_ratio([10, 20, 30], [5, 15, 40])
    away = [math.log(55 / 50), math.log(45 / 40), math.log(20 / 30)]
    se = math.sqrt(2 / 3 * sum(one**2 for one in away))
    shares = [(10 / 60 + 5 / 60) / 2, (20 / 60 + 15 / 60) / 2, (30 / 60 + 40 / 60) / 2]
    half = stats.t.ppf(0.975, max(1, 1 / sum(one**2 for one in shares) - 1)) * se
    assert found.value == 1
    assert (found.low, found.high) == pytest.approx((math.exp(-half), math.exp(half)))
    assert found.p_value == pytest.approx(1)


def test_clusters_are_the_units_of_a_ratio() -> None:
    """Each problem four times in one cluster: the interval is that of the clusters, twice as wide as that of "40 problems"."""
    random = np.random.default_rng(2)
    a, b = random.gamma(4, 50, 10), random.gamma(4, 40, 10)
    index = list(np.repeat(np.arange(10), 4))
    once, clustered = paired_log_ratio(a, b), paired_log_ratio(np.repeat(a, 4), np.repeat(b, 4), index)  # type: ignore[arg-type]
    naive = paired_log_ratio(np.repeat(a, 4), np.repeat(b, 4))  # type: ignore[arg-type]
    assert clustered == pytest.approx(once)
    assert math.log(clustered.high / clustered.low) > 1.8 * math.log(naive.high / naive.low)  # type: ignore[operator]


def test_no_logarithm_no_interval() -> None:
    found = paired_log_ratio([10.0] * 8, [0.0] * 8)
    assert (found.value, found.low, found.high) == (0, None, None)
    assert found.p_value < 0.05, "the sign-flip test still decides"


@settings(deadline=None, max_examples=60)
@given(lengths, st.floats(0.1, 10))
def test_ratio_does_not_depend_on_the_unit_and_is_exact_for_proportional_lengths(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = paired_log_ratio(a, b), paired_log_ratio([factor * x for x in a], [factor * y for y in b])
    assert one.value == pytest.approx(other.value)
    if one.low is not None and other.low is not None and max(one.high or 0, other.high or 0) < 1e6:
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-4)
    same = paired_log_ratio(a, [0.5 * x for x in a])
    assert same.value == pytest.approx(0.5)
    if same.low is not None and same.high is not None:
        assert same.high - same.low < 1e-6


def test_ratio_interval_covers() -> None:
    """1,000 simulated runs of 60 problems whose true ratio is 0.8: the 95% interval holds it in 93 to 97% of them."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        a = random.gamma(4, 50, 60)
        b = a * 0.8 * random.gamma(10, 0.1, 60)
        found = paired_log_ratio(a.tolist(), b.tolist())
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.8 <= found.high
    assert 930 <= hits <= 970


@pytest.mark.parametrize(
    ("factor", "broken", "word"),
    [
        (0.6, 0, "shorter, accuracy held"),
        (0.6, 40, "shorter, accuracy lost"),
        (0.6, 3, "shorter, accuracy not settled"),
        (1.0, 0, "no change in length shown"),
        (1.5, 0, "longer"),
    ],
)
def test_verdicts(factor: float, broken: int, word: str) -> None:
    random = np.random.default_rng(1)
    base = random.integers(50, 150, 100)
    correct = [i % 5 > 0 for i in range(100)]
    arm = [right and i >= broken for i, right in enumerate(correct)]
    noise = random.integers(-10, 11, 100)
    rows = rows_of("baseline", base.tolist(), correct) + rows_of("x", (factor * base + noise).astype(int).tolist(), arm)
    pair = compare_arms(rows).pair("baseline", "x")
    found = efficiency(pair)
    assert found.verdict == word
    assert found.sentence.startswith(f"x: {word}. Thinking tokens {percent_change(found.tokens.ratio)} (")


@pytest.mark.parametrize(("num", "word"), [(20, "shorter, accuracy not settled"), (200, "shorter, accuracy held")])
def test_no_change_on_few_problems_settles_nothing(num: int, word: str) -> None:
    """1 - 0.05^(1/20) = 13.9 points, 1 - 0.05^(1/200) = 1.5 points."""
    correct = [i % 5 > 0 for i in range(num)]
    rows = rows_of("baseline", [100 + i % 7 for i in range(num)], correct)
    rows += rows_of("x", [50 + i % 5 for i in range(num)], correct)
    found = efficiency(compare_arms(rows).pair("baseline", "x"))
    assert found.accuracy.low == found.accuracy.high == 0
    assert found.verdict == word
    assert "accuracy 0.0 points (no interval: all problems moved alike)." in found.sentence
    assert "; ratio of mean tokens over the same problems)" in found.sentence
    assert ("Up to 13.9 points may be lost, 3 would count as held." in found.sentence) == (num == 20)


def test_one_gained_sample_does_not_switch_the_bound_off() -> None:
    """40 problems x 4, one sample gained: the t interval is a sliver that would hold 3 points, the bound is 7 points wide."""
    rows = rows_of("baseline", [100 + i % 7 for i in range(160)], [i > 0 for i in range(160)], k=4)
    rows += rows_of("x", [50 + i % 5 for i in range(160)], [True] * 160, k=4)
    pair = compare_arms(rows).pair("baseline", "x")
    assert pair.accuracy.low > -0.03
    assert pair.accuracy.loss_bound == pytest.approx(1 / 160 - (1 - 0.05 ** (1 / 40)))
    assert efficiency(pair).verdict == "shorter, accuracy not settled"


def test_the_bound_counts_the_losers_that_were_seen() -> None:
    """100 problems, two lost outright: by Clopper and Pearson up to 6.2% may be lost, 4.2 points more than seen."""
    before, after = np.ones(100), np.r_[np.zeros(2), np.ones(98)]
    upper = stats.binomtest(2, 100).proportion_ci(0.9).high  # two-sided 90%: its upper end is the one-sided 95% bound
    assert paired_difference(before, after, denominator=1).loss_bound == pytest.approx(-0.02 - (upper - 0.02))
    small = paired_difference(before, np.r_[np.full(50, 0.75), np.ones(50)], denominator=4).loss_bound
    upper = stats.binomtest(50, 100).proportion_ci(0.9).high
    assert small == pytest.approx(-0.125 - max(0.25 * (upper - 0.5), 1 - 0.05**0.01))


def test_shorter_because_it_was_cut_is_said() -> None:
    rows = rows_of("baseline", [100 + i for i in range(40)], [True] * 40)
    cut = [dataclasses.replace(one, finish_reason="length") for one in rows_of("x", [50] * 40, [False] * 40)]
    found = efficiency(compare_arms(rows + cut).pair("baseline", "x"))
    assert found.verdict == "shorter, accuracy lost"
    assert found.sentence.endswith(
        "The token limit cut 100.0% of its samples and 0.0% of those of baseline: their lengths are lower bounds."
    )


def test_repetition_and_loops() -> None:
    rows = rows_of("baseline", [40, 40], [True, False]) + rows_of("x", [40, 40], [True, True])
    arm = compare_arms(rows).arm("baseline")
    looping, plain = [1, 2, 3, 4, *([7, 8, 9] * 12)], list(range(40))
    found = thoughts_of(arm, rows, [looping, plain])
    assert found.loops == 0.5
    assert found.repetition == pytest.approx((33 / 40 + 0) / 2)
    assert found.closed == 1
    with pytest.raises(ValueError, match="2 grades and 1 samples: give all of both"):
        thoughts_of(arm, rows, [looping])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0], [1.0], "two or more problems"),
        ([1.0, 2.0], [1.0], "got 2 and 1"),
        ([0.0, 0.0], [1.0, 1.0], "nothing to divide by"),
    ],
)
def test_refusals(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_log_ratio(a, b)
