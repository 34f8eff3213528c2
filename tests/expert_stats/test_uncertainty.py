"""Evidence: tests and intervals against naive versions, and in simulated worlds in which nothing, or what was planted, is associated."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest

from expert_stats import ExpertScores, score_experts
from expert_stats.evidence import (
    MarkerEstimate,
    Measure,
    Ratio,
    RatioEstimate,
    agreement_of_families,
    false_discovery_rate,
    identity_of,
    problem_sums,
    rank_agreement,
    robust_p,
    top_overlap,
)
from expert_stats.evidence.reliability import draws_of
from expert_stats.trace_counts import References
from stats_helpers import random_counts, subset
from worlds import PLANTED, WORLDS, counts_of_world, pooled_q, sums_of_world

RUNS, MORE = 6, 14


@cache
def runs(world: str, num_problems: int, planted: float = 0.0) -> list[ExpertScores]:
    return [
        score_experts(counts_of_world(world, num_problems, seed, planted=planted))
        for seed in range(MORE if world == "all" else RUNS)
    ]


def found(scores: ExpertScores) -> np.ndarray:
    return np.flatnonzero(scores.q_MLE.ravel() <= 0.05)


def test_with_nothing_associated_no_more_is_found_than_the_level_allows() -> None:
    """The old q finds experts in nearly every run where problem kinds or drift move both the marker and the experts."""
    hits, pooled = 0, dict.fromkeys(WORLDS, 0)
    for world in WORLDS:
        for scores in runs(world, 50)[:RUNS]:
            hits += len(found(scores)) > 0
            old = pooled_q(
                scores.joint_MLE[0].ravel(), scores.expert_LE.ravel(), scores.occurrences[0], scores.num_tokens
            )
            pooled[world] += bool((old <= 0.05).any())
        assert np.mean([(scores.p_MLE < 0.05).mean() for scores in runs(world, 50)]) < 0.06, world
    assert hits <= 4, "30 runs at level .05: more than 4 has probability .004"
    assert pooled["kinds"] >= RUNS - 1
    assert pooled["all"] == RUNS
    assert pooled["drift"] >= 2
    assert pooled["iid"] <= 1


def test_planted_experts_are_found_and_no_others() -> None:
    scores = runs("all", 100, 1.2)
    assert np.mean([np.isin(PLANTED, found(one)).mean() for one in scores]) >= 0.95
    wrong = [np.setdiff1d(found(one), PLANTED).size / max(len(found(one)), 1) for one in scores]
    assert np.mean(wrong) <= 0.05


def test_intervals_cover_and_the_bound_of_the_chosen_holds() -> None:
    truth = Measure(np.array([1.0])).score(*sums_of_world("all", 1200, 99))
    covered, bounded, naive = [], [], []
    for scores in runs("all", 50):
        low, high, bound = (table.ravel() for table in (scores.low_LE, scores.high_LE, scores.bound_LE))
        covered.append(((low <= truth) & (truth <= high)).mean())
        best = [row.layer * 64 + row.expert for row in scores.ranking()[:2]]
        bounded.append(all(bound[at] <= truth[at] for at in best))
        naive += [low[at] <= truth[at] for at in best]
    assert 0.91 < np.mean(covered) < 0.98
    assert np.mean(bounded) >= 0.85, "14 runs of a bound that fails in a twentieth"
    assert np.mean(naive) < 0.95, "an interval that ignores the choice does not cover what was chosen"


def test_the_excess_is_that_of_a_loop_over_traces_and_bins() -> None:
    counts = random_counts(3, num_problems=6, samples=2)
    sums = problem_sums(counts, np.array([True, False, True]))
    z, p = robust_p(sums.excess_of(2), 8)
    beyond, drawn = np.zeros((6, 2, 4)), np.zeros((2, 4))
    for trace, expert, joint in counts.unpacked():
        problem = int(trace.trace_id.split("-")[1].split("#")[0])
        beyond[problem] += joint[2]
        for place, total in enumerate(trace.total_B.tolist()):
            seen = int(trace.marker_MB[2, place])
            if seen:
                rate = expert[place] / total
                beyond[problem] -= seen * rate
                drawn += seen * rate * (1 - rate) * (total - seen) / max(total - 1, 1)
    spread = np.sqrt(np.maximum(beyond.var(0, ddof=1) * 6, drawn))
    np.testing.assert_allclose(z.reshape(2, 4), beyond.sum(0) / spread, rtol=1e-9)
    assert sums.excess_of(1) is None
    assert ((p < 0.5) == (z > 0)).all()
    assert np.isnan(
        robust_p(problem_sums(random_counts(3, num_problems=1), np.array([True] * 3)).excess_of(0), 8)[0]
    ).all()


def test_influence_gives_the_errors_of_the_bootstrap() -> None:
    scores_of = Measure(np.array([1.0]))
    sums = problem_sums(counts_of_world("all", 80, 1), np.array([True]))
    totals, estimate = sums.rows(slice(None)), MarkerEstimate(sums, scores_of, None)
    error = np.sqrt((estimate.influence(slice(None)) ** 2).sum(0))
    cells = np.flatnonzero(totals[0][0] >= 30)
    draws = estimate.replicates(cells, draws_of(np.random.default_rng(0), 1000, 80))
    ratio = error[cells] / draws.std(0)
    assert len(cells) > 20
    assert 0.94 < np.median(ratio) < 1.06
    assert np.quantile(ratio, 0.05) > 0.85
    assert np.quantile(ratio, 0.95) < 1.15
    np.testing.assert_allclose(estimate.influence(slice(None)).sum(0), 0, atol=1e-9)


def test_an_expert_never_seen_at_a_marker_has_an_interval_that_knows_it() -> None:
    measure = Measure(np.array([1.0]))
    few, many = (
        measure.unseen_variance(np.array([[0]]), np.array([50 * n]), np.array([30 * n]), 9000 * n)[0] for n in (1, 100)
    )
    assert few > 0.01
    assert many < few / 10


def test_a_marker_is_ranked_among_tokens() -> None:
    expert, total = np.array([100, 200, 400, 3300]), 4000
    joint = np.array([[40, 2, 4, 4]])
    seen = np.array([50])
    # Twenty tokens without any preference, and one that is closer to expert 1 than the marker is to expert 0.
    plain = [[3, 5, 10, 82]] * 20
    closer = [[0, 98, 1, 1]]
    references = References(tuple(range(21)), ("",) * 21, np.array(plain + closer)[:, None], np.full(21, 100))
    found = identity_of(joint, expert, seen, total, references)
    assert found.num == 21
    assert found.rank_of(0) == 2
    assert found.p_MC[0, 0] == pytest.approx(2 / 22)
    assert found.rank_MC[0].tolist()[0] == 1
    alone = identity_of(joint, expert, seen, total, References((), (), np.zeros((0, 1, 4), int), np.zeros(0, int)))
    assert alone.num == 0
    assert np.isnan(alone.p_MC).all()


def test_the_token_null_keeps_its_level() -> None:
    """Tokens alike: the marker is one of them at random, and any of its experts passes at .05 in a twentieth of the draws."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        rate = rng.dirichlet(np.full(32, 0.3), 40)
        drawn = np.array([rng.multinomial(200, row) for row in rate])
        expert = drawn.sum(0) + 100
        references = References(tuple(range(39)), ("",) * 39, drawn[1:, None], np.full(39, 200))
        found = identity_of(drawn[:1], expert, np.array([200]), int(expert.sum()), references)
        hits += bool((found.p_MC <= 0.05).any())
    assert 0.02 < hits / 400 < 0.085


def test_one_problem_gives_no_interval() -> None:
    scores = score_experts(random_counts(4, num_problems=1, tokens=200))
    assert np.isnan(scores.error_LE).all()
    assert np.isnan(scores.low_LE).all()
    assert math.isnan(scores.ranking()[0].q)


def test_halves_are_every_other_problem_and_judge_support_by_themselves() -> None:
    counts = random_counts(4, num_problems=4, samples=2, tokens=60)
    scores = score_experts(counts)
    for start, (half, own) in enumerate(zip(scores.halves[:2], scores.halves[2:], strict=True)):
        one = score_experts(subset(counts, [n for n in range(8) if n // 2 % 2 == start]), missing_marker="skip")
        np.testing.assert_array_equal(half, one.score_LE)
        np.testing.assert_array_equal(own, one.supported_LE)
    nothing = [one.stability["spearman"] for one in runs("iid", 50)]
    assert abs(np.mean(nothing)) < 0.12, "halves of noise do not disagree by their filter"


def test_families_agree_where_they_share_experts_and_the_worst_without_one_is_kept() -> None:
    """Maths and physics have the same routing, law another router's."""
    maths, law = (counts_of_world("iid", 30, 1, planted=1.5, experts=router) for router in (0, 5))
    traces = [
        dataclasses.replace(trace, trace_id=f"{name}/{trace.trace_id}", family=name)
        for name, part in (("maths", maths), ("physics", maths), ("law", law))
        for trace in part.traces
    ]
    counts = dataclasses.replace(maths, traces=tuple(traces), references=None)
    scores = score_experts(counts)
    assert scores.families["families"] == ["law", "maths", "physics"]
    assert scores.families["problems"] == [30, 30, 30]
    for table in ("overlap", "spearman"):
        same, other = scores.families[table][1][2], scores.families[table][0][1]
        assert same[0] == pytest.approx(1.0)
        assert other[1] <= other[0] <= other[2] < 0.95
        assert scores.families[table][1][0][0] == pytest.approx(other[0])
    without = [
        subset(counts, [n for n, t in enumerate(counts.traces) if t.family != name])
        for name in ("law", "maths", "physics")
    ]
    parts = [score_experts(part) for part in without]
    np.testing.assert_allclose(scores.without_score_LE, np.nanmin([part.score_LE for part in parts], axis=0))
    np.testing.assert_allclose(scores.without_p_LE, np.nanmax([part.p_MLE[0] for part in parts], axis=0))
    assert np.isnan(score_experts(random_counts(2)).without_p_LE).all()
    assert score_experts(random_counts(2)).families["families"] == []


def test_the_agreement_of_two_families_covers_what_so_many_problems_agree_on() -> None:
    """Spearman of two families of 30 problems each, over the same run again and again; a bootstrap covers it in 41%."""
    rng, runs, problems, experts, hits = np.random.default_rng(0), 40, 30, 64, 0
    true = rng.normal(0, 1, (2, experts))
    true[1] = 0.9 * true[0] + math.sqrt(1 - 0.9**2) * true[1]
    means = true[:, None] + rng.normal(0, 3 / math.sqrt(problems), (2, 400, experts))
    agreed = np.mean([rank_agreement(a, b) for a, b in zip(*means, strict=True)])
    for _ in range(runs):
        above_PC = np.concatenate([true[side] + rng.normal(0, 3, (problems, experts)) for side in (0, 1)])
        found = agreement_of_families(
            RatioEstimate(
                problems=tuple(map(str, range(2 * problems))),
                families=("a",) * problems + ("b",) * problems,
                terms=(Ratio(1.0, above_PC, np.ones((2 * problems, 1))),),
                selected_PC=np.ones(above_PC.shape, np.bool_),
                num_experts=experts,
                signed=True,
            )
        )["spearman"]
        hits += found[0][1][1] <= agreed <= found[0][1][2]
        assert found[0][0] == [pytest.approx(1.0), 1.0, 1.0]
    assert hits / runs > 0.88


def test_false_discovery_rate_by_hand() -> None:
    q = false_discovery_rate(np.array([0.01, np.nan, 0.04, 0.03, 0.5]))
    np.testing.assert_allclose(q, [0.04, np.nan, 0.16 / 3, 0.16 / 3, 0.5])
    assert np.isnan(false_discovery_rate(np.array([np.nan]))).all()


def test_rank_agreement_and_overlap() -> None:
    a = np.array([[1.0, 2.0, 3.0, np.nan, 5.0]])
    assert rank_agreement(a, a * 10) == pytest.approx(1.0)
    assert rank_agreement(a, -a) == pytest.approx(-1.0)
    assert math.isnan(rank_agreement(a, np.full_like(a, 1.0)))
    assert math.isnan(rank_agreement(a[:, :2], a[:, :2]))
    assert top_overlap(a, a, 2) == 1.0
    assert top_overlap(a, np.array([[9.0, 1.0, 2.0, 8.0, 8.5]]), 2) == 0.5
    assert math.isnan(top_overlap(a, a, 5))
