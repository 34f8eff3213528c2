"""Intervals, halves and the null, against naive versions and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import score_experts
from expert_stats.scores import false_discovery_rate, interval, jackknife_error, rank_agreement, top_overlap, upper_tail
from stats_helpers import random_counts


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([3.0, 5.0, 8.0, 2.0, 7.0])
    left_out = np.array([[np.delete(values, group).mean()] for group in range(5)])
    assert jackknife_error(left_out)[0] == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_one_group_gives_no_interval() -> None:
    scores = score_experts(random_counts(4, num_problems=1, tokens=200))
    assert np.isnan(scores.error_LE).all()
    assert np.isnan(scores.low_LE).all()
    assert math.isnan(scores.stability["spearman"])
    assert scores.ranking()


def test_intervals_widen_with_fewer_groups() -> None:
    one = np.array([1.0])
    assert interval(one, one, 16)[1] < interval(one, one, 3)[1]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_null_is_the_exact_count_of_subsets(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 30))
    expert, marker = data.draw(st.integers(1, total)), data.draw(st.integers(1, total))
    joint = data.draw(st.integers(max(0, expert + marker - total), min(expert, marker)))
    ways = [math.comb(expert, k) * math.comb(total - expert, marker - k) for k in range(joint, min(expert, marker) + 1)]
    found = upper_tail(np.array([[[joint]]]), np.array([[expert]]), np.array([marker]), total)
    assert float(found[0, 0, 0]) == pytest.approx(sum(ways) / math.comb(total, marker), rel=1e-9)


def test_cells_never_seen_have_no_null() -> None:
    found = upper_tail(np.zeros((2, 1, 2), int), np.array([[0, 5]]), np.array([0, 3]), 10)
    assert np.isnan(found).tolist() == [[[True, True]], [[True, False]]]


def test_false_discovery_rate_by_hand() -> None:
    q = false_discovery_rate(np.array([0.01, np.nan, 0.04, 0.03, 0.5]))
    np.testing.assert_allclose(q, [0.04, np.nan, 0.16 / 3, 0.16 / 3, 0.5])
    assert np.isnan(false_discovery_rate(np.array([np.nan]))).all()


def test_the_null_rarely_rejects_independent_routing() -> None:
    rng = np.random.default_rng(0)
    total, marker = 2000, 200
    joint, expert = np.zeros((1, 1, 400), int), np.zeros((1, 400), int)
    for e in range(400):
        chosen = rng.random(total) < rng.uniform(0.02, 0.3)
        expert[0, e], joint[0, 0, e] = chosen.sum(), chosen[:marker].sum()
    p = upper_tail(joint, expert, np.array([marker]), total)
    assert (p < 0.05).mean() < 0.07
    assert (false_discovery_rate(p) < 0.05).sum() <= 1


def test_rank_agreement_and_overlap() -> None:
    a = np.array([[1.0, 2.0, 3.0, np.nan, 5.0]])
    assert rank_agreement(a, a * 10) == pytest.approx(1.0)
    assert rank_agreement(a, -a) == pytest.approx(-1.0)
    assert math.isnan(rank_agreement(a, np.full_like(a, 1.0)))
    assert math.isnan(rank_agreement(a[:, :2], a[:, :2]))
    assert top_overlap(a, a, 2) == 1.0
    assert top_overlap(a, np.array([[9.0, 1.0, 2.0, 8.0, 8.5]]), 2) == 0.5
    assert math.isnan(top_overlap(a, a, 5))
