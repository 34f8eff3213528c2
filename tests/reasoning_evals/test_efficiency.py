"""Shorter thoughts and what they cost: ratios, verdicts, repetition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.comparing.token_use import efficiency, paired_ratio, percent_change, thoughts_of
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
    """a = (10, 20), b = (5, 15): r = 20/30; residuals 5 - 10 r = -5/3 and 15 - 20 r = 5/3; sd^2 = 50/9; t(1) = 12.7062."""
    found = paired_ratio([10, 20], [5, 15])
    half = 12.706204736 * math.sqrt(50 / 9 / 2) / 15
    assert found.value == pytest.approx(2 / 3)
    assert (found.low, found.high) == pytest.approx((2 / 3 - half, 2 / 3 + half))


@settings(deadline=None, max_examples=60)
@given(lengths, st.floats(0.1, 10))
def test_ratio_does_not_depend_on_the_unit_and_is_exact_for_proportional_lengths(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = paired_ratio(a, b), paired_ratio([factor * x for x in a], [factor * y for y in b])
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-6, abs=1e-6)
    same = paired_ratio(a, [0.5 * x for x in a])
    assert same.value == pytest.approx(0.5)
    assert same.high - same.low < 1e-6


def test_ratio_interval_covers() -> None:
    """1,000 simulated runs of 60 problems whose true ratio is 0.8: the 95% interval holds it in 93 to 97% of them."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        a = random.gamma(4, 50, 60)
        b = a * 0.8 * random.gamma(10, 0.1, 60)
        found = paired_ratio(a.tolist(), b.tolist())
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
    found = efficiency("x", rows, pair.accuracy)
    assert found.verdict == word
    assert found.sentence.startswith(f"x: {word}. Thinking tokens {percent_change(found.tokens.value)} (")


@pytest.mark.parametrize(("num", "word"), [(20, "shorter, accuracy not settled"), (200, "shorter, accuracy held")])
def test_no_change_on_few_problems_settles_nothing(num: int, word: str) -> None:
    """1 - 0.05^(1/20) = 13.9 points, 1 - 0.05^(1/200) = 1.5 points."""
    correct = [i % 5 > 0 for i in range(num)]
    rows = rows_of("baseline", [100 + i % 7 for i in range(num)], correct)
    rows += rows_of("x", [50 + i % 5 for i in range(num)], correct)
    found = efficiency("x", rows, compare_arms(rows).pair("baseline", "x").accuracy)
    assert found.accuracy.low == found.accuracy.high == 0
    assert found.verdict == word
    assert found.sentence.endswith("accuracy 0.0 points (no interval: all problems moved alike).")


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
        paired_ratio(a, b)
