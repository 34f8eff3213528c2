"""Intervals from problems that did not choose the expert: against naive versions, their coverage in simulated worlds, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from expert_stats import RoutingCounts, fresh_lines, interval_lines, score_experts
from expert_stats.evidence import (
    EVERY,
    HALVES,
    Fresh,
    MarkerEstimate,
    Measure,
    Ratio,
    RatioEstimate,
    halves_of,
    measured,
    measured_by_halves,
    problem_sums,
)
from stats_helpers import random_counts, subset
from worlds import EXPERTS, LAYERS, PLANTED, counts_of_world, drawn, pool_of_world

MEASURE = Measure(np.array([1.0]))


def renamed(counts: RoutingCounts) -> RoutingCounts:
    """The same traces as answers to other problems."""
    traces = tuple(dataclasses.replace(trace, trace_id=f"other/{trace.trace_id}") for trace in counts.traces)
    return dataclasses.replace(counts, traces=traces)


def test_leaving_a_problem_out_is_scoring_without_it() -> None:
    counts = random_counts(3, num_problems=6, samples=2)
    estimate = MarkerEstimate(
        problem_sums(counts, np.array([True, False, True])), Measure(np.array([1.0, -1.0, 0.5])), None
    )
    cells = np.array([5, 0, 3])
    for rows in (slice(None), slice(1, None, 2)):
        numbers = np.arange(6)[rows]
        naive = [estimate.score(numbers[numbers != one])[cells] for one in numbers]
        np.testing.assert_allclose(estimate.left_out(rows, cells), naive, rtol=1e-12)
    assert (estimate.unseen(slice(1, None, 2)) >= estimate.unseen()).all()


def test_of_a_plain_mean_the_interval_is_student_s_and_knows_what_few_problems_carry() -> None:
    """With weights of one the score is a mean, and its jackknife the textbook's."""
    value_PC = np.random.default_rng(0).normal(size=(40, 4))
    value_PC[:, 2] = np.r_[np.ones(20), -np.ones(20)]
    value_PC[7, 1], value_PC[3, 3] = 4.0, 1000.0
    ones, names = np.ones((40, 1)), ("",) * 40
    estimate = RatioEstimate(
        problems=names, families=names, terms=(Ratio(2.0, value_PC, ones),), selected_PC=value_PC != 0, num_experts=4, signed=True
    )  # fmt: skip
    score_C, low_C, high_C = measured(estimate, slice(None), np.arange(4))
    np.testing.assert_allclose(score_C, 2 * value_PC.mean(0))
    np.testing.assert_allclose((low_C + high_C) / 2, score_C)
    reach_C = (high_C - low_C) / 2 / ((2 * value_PC).std(0, ddof=1) / np.sqrt(40))
    kurtosis = stats.kurtosis(value_PC, fisher=False)
    wanted = [stats.t.ppf(0.975, np.clip(39 * min(3 / one, 1) ** 2, 3, 39)) for one in kurtosis]
    np.testing.assert_allclose(reach_C, wanted)
    assert reach_C[2] == pytest.approx(2.0227, abs=1e-4), "one degree of freedom less than problems"
    assert 2.0227 < reach_C[1] < reach_C[3] == pytest.approx(3.1824, abs=1e-4), "three at least"
    assert np.isnan(measured(estimate, slice(0, 1), np.arange(4))[1]).all()


@pytest.mark.parametrize(("world", "num_problems"), [("iid", 30), ("kinds", 30), ("kinds", 100)])
def test_it_covers_what_the_other_half_chose(world: str, num_problems: int) -> None:
    """A pool of problems is the population, so the true score is known exactly. Long, in every world: tests/bench/evidence.py."""
    pool = pool_of_world(world, 600, 99)
    truth_C, rng = MEASURE.score(*pool.rows(slice(None))), np.random.default_rng(num_problems)
    inside, alone = [], []
    for _ in range(120):
        estimate = MarkerEstimate(drawn(pool, num_problems, rng), MEASURE, None)
        error_C = np.sqrt((estimate.influence(slice(None)) ** 2).sum(0))
        score_C = np.where(estimate.supported(slice(None)), estimate.score(slice(None)), -np.inf)
        best = np.argsort(-score_C)[:2]
        alone += (np.abs(score_C - truth_C)[best] <= 1.96 * error_C[best]).tolist()
        found = measured_by_halves(estimate, halves_of(estimate), tuple(range(LAYERS)), EXPERTS)
        inside += [one.low <= truth_C[one.layer * EXPERTS + one.expert] <= one.high for one in found if one.rank <= 2]
    assert len(inside) == 480
    assert 0.91 <= np.mean(inside) <= 0.985, "four deviations about .93 to .97"
    if world == "iid":  # in the other the best stand clear of the rest
        assert np.mean(alone) < 0.9, "an interval from the problems that chose it does not"


def test_each_half_chooses_by_itself_and_is_measured_in_the_other() -> None:
    counts = counts_of_world("all", 40, 0, planted=1.2)
    scores = score_experts(counts)
    for name, start in zip(HALVES, (0, 1), strict=True):
        own, other = (score_experts(subset(counts, range(at, 40, 2))) for at in (start, 1 - start))
        found = [one for one in scores.fresh if one.chosen_by == name]
        assert [(one.layer, one.expert) for one in found] == [(row.layer, row.expert) for row in own.ranking()[:10]]
        assert [one.rank for one in found] == list(range(1, 11))
        for one in found:
            assert one.score == pytest.approx(other.score_LE[one.layer, one.expert])
            assert one.problems == 20
    lines = fresh_lines(scores, [(0, 0)])
    assert len(lines) == 2, "which experts are asked for does not matter: the halves chose"
    first = next(one for one in scores.fresh if one.chosen_by == HALVES[0])
    assert lines[0].startswith(
        "FRESH: score and 95% interval from 20 problems that did not choose it, chosen by the first half: "
        f"layer {first.layer} expert {first.expert} {first.score:+.2f} ({first.low:+.2f} to {first.high:+.2f}), layer "
    )
    assert scores.elsewhere == {}
    few = score_experts(random_counts(2, num_problems=3), missing_marker="skip")
    assert {one.chosen_by for one in few.fresh if np.isfinite(one.low)} == {"second half"}, (
        "one problem measures nothing"
    )


def test_other_counts_measure_all_that_was_chosen_and_know_what_luck_added() -> None:
    counts, others = (counts_of_world("all", num, seed, planted=1.2) for num, seed in ((30, 0), (40, 1)))
    scores = score_experts(counts, measured_on=renamed(others))
    alone = score_experts(counts)
    assert np.array_equal(scores.score_LE, alone.score_LE, equal_nan=True), "the choice does not hear of them"
    assert [(one.layer, one.expert) for one in scores.fresh] == [(row.layer, row.expert) for row in scores.ranking()]
    there = score_experts(others)
    for one in scores.fresh:
        assert one == Fresh(EVERY, *one[1:4], 40, *one[5:])
        assert one.score == pytest.approx(there.score_LE[one.layer, one.expert])
    planted = divmod(int(PLANTED[0]), EXPERTS)
    assert scores.elsewhere[planted].low > 0
    lines = scores.table(3).splitlines()
    assert "fresh interval" in lines[0]
    best = scores.elsewhere[scores.ranking()[0][:2]]
    assert f"{best.low:+.2f} {best.high:+.2f}" in lines[1]
    (line,) = fresh_lines(scores, [planted])
    assert line.startswith("FRESH: score and 95% interval from 40 problems that did not choose it: layer 0 expert 3 +")
    assert interval_lines(scores) == interval_lines(alone)


def test_counts_that_chose_and_counts_of_another_kind_are_refused() -> None:
    counts = random_counts(2, num_problems=4)
    with pytest.raises(ValueError, match="problem '.*' and 3 others would choose experts and measure them"):
        score_experts(counts, missing_marker="skip", measured_on=counts)
    other = random_counts(2, num_problems=4, num_experts=8)
    with pytest.raises(ValueError, match="cannot be measured in counts of another kind: model.num_experts is"):
        score_experts(counts, missing_marker="skip", measured_on=renamed(other))
    with pytest.raises(ValueError, match="the counts to measure in hold no tokens"):
        score_experts(counts, missing_marker="skip", measured_on=subset(counts, []))
