"""A stated mis-exit rate: held in a simulation where it must hold, broken where its assumption is."""

import dataclasses

import numpy as np
import pytest

from reasoning_evals.comparing import ExitPoint, control_risk, lost_answers
from reasoning_evals.comparing.risk_control import reachable, taken
from reasoning_evals.runs import GradeRow


def world(random: np.random.Generator, problems: int, skill: float = 1.5, hard: float = 0.0) -> dict:
    """Problems of two samples. A thought nears its answer step by step; a probe reads how near it is, with noise, and an exit harms
    by the chance that is left. ``hard`` shifts what is read of every problem, but not what holds."""
    found = {}
    for number in range(problems):
        ease = random.normal()
        group = []
        for _ in range(2):
            steps = random.integers(1, 9)
            nearness = ease + skill * np.arange(steps) / 3 - 1 + 0.3 * random.normal(size=steps)
            harms = random.random(steps) < 1 / (1 + np.exp(2 * nearness))
            read = 1 / (1 + np.exp(-(nearness + hard + 0.7 * random.normal(size=steps))))
            group.append([ExitPoint(score=float(s), harms=bool(h)) for s, h in zip(read, harms, strict=True)])
        found[str(number)] = group
    return found


def rate_of(samples: dict, threshold: float) -> float:
    return float(
        np.mean([np.mean([any(p.harms for p in taken(s, threshold)) for s in group]) for group in samples.values()])
    )


def test_the_rate_holds_on_new_problems_of_the_same_kind_and_not_on_others() -> None:
    random = np.random.default_rng(0)
    for rate, calibration in ((0.1, 20), (0.25, 8)):
        same, shifted, exits, naive = [], [], [], []
        for _ in range(120):
            known = world(random, calibration)
            control = control_risk(known, rate)
            new = world(random, 20)
            same.append(rate_of(new, control.threshold))
            shifted.append(rate_of(world(random, 20, hard=2.0), control.threshold))
            exits.append(np.mean([bool(taken(s, control.threshold)) for group in new.values() for s in group]))
            if calibration < 10:
                within = [t for t in np.linspace(0.98, 0.02, 49) if rate_of(known, t) <= rate]
                naive.append(rate_of(new, min(within)))
        error = 3 * np.std(same) / np.sqrt(len(same))
        assert np.mean(same) <= rate + error
        assert np.mean(shifted) > 1.3 * rate, "a probe that reads all problems as easier breaks the assumption"
        assert not naive or np.mean(naive) > rate, (
            "the best threshold on the problems of calibration does not hold its rate"
        )
        assert np.mean(exits) > 0.05, "it does end thoughts"


def test_the_threshold_is_the_lowest_that_the_definition_allows() -> None:
    """Against the definition, threshold by threshold: the largest loss at any threshold of t or more."""
    random = np.random.default_rng(1)
    for _ in range(4):
        samples = world(random, 7)
        control = control_risk(samples, 0.2)
        scores = sorted({0.0, *(p.score for group in samples.values() for s in group for p in s)})

        def bound(t: float, samples: dict = samples, scores: list = scores) -> float:
            losses = []
            for group in samples.values():
                worst = [max(any(p.harms for p in taken(s, u)) for u in scores if u >= t) for s in group]
                losses.append(np.mean(worst))
            return float((len(losses) * np.mean(losses) + 1) / (len(losses) + 1))

        allowed = [t for t in scores if bound(t) <= 0.2 + 1e-12]
        assert control.threshold == min(allowed)
        assert control.empirical <= bound(control.threshold)


def test_what_can_be_stated() -> None:
    easy = {str(n): [[ExitPoint(score=0.5, harms=False)]] for n in range(9)}
    assert control_risk(easy, 0.1) == control_risk(easy, 0.3).__class__(
        threshold=0.0, rate=0.1, problems=9, empirical=0.0, exits=1.0
    )
    with pytest.raises(
        ValueError, match="9 problems can state no rate below 0.1, and 0.05 is asked for: give at least 19"
    ):
        control_risk(easy, 0.05)
    with pytest.raises(ValueError, match="the rate is 1"):
        control_risk(easy, 1.0)
    falling = [ExitPoint(score=s, harms=False) for s in (0.3, 0.2, 0.5, 0.5, 0.4)]
    assert [point.score for point in reachable(falling)] == [0.3, 0.5]


def test_lost_answers_are_counted_sample_by_sample() -> None:
    def row(arm: str, problem: str, sample: int, outcome: str) -> GradeRow:
        return GradeRow(
            arm=arm, task="t", problem_id=problem, sample_idx=sample, outcome=outcome, extracted=None, reason="", method="",
            state="closed", finish_reason="stop", thinking_tokens=1, answer_tokens=1, total_tokens=2,
        )  # fmt: skip

    rows = [
        row("a", p, s, o)
        for p, s, o in (("x", 0, "correct"), ("x", 1, "correct"), ("y", 0, "wrong"), ("y", 1, "wrong"))
    ]
    rows += [
        row("b", p, s, o)
        for p, s, o in (("x", 0, "wrong"), ("x", 1, "correct"), ("y", 0, "correct"), ("y", 1, "wrong"))
    ]
    found = lost_answers(rows, "a", "b")
    assert (found.mean, found.num_problems) == (0.25, 2)
    assert 0 <= found.low < found.mean < found.high <= 1
    shared = [
        dataclasses.replace(one, problem_id=one.problem_id + str(n), cluster_id=one.problem_id)
        for one in rows
        for n in range(9)
    ]
    alone = [dataclasses.replace(one, cluster_id=None) for one in shared]
    assert lost_answers(shared, "a", "b").high > lost_answers(alone, "a", "b").high + 0.1, "18 problems of two clusters"


def test_the_interval_of_lost_answers_covers_a_few_in_a_hundred() -> None:
    """2% are lost: a t interval of 100 problems ends below that in one run of seven."""
    random, runs, hits = np.random.default_rng(1), 150, 0
    for _ in range(runs):
        rows = [
            GradeRow(
                arm=arm, task="t", problem_id=str(number), sample_idx=0, outcome="correct" if right else "wrong",
                extracted=None, reason="", method="", state="closed", finish_reason="stop", thinking_tokens=1,
                answer_tokens=1, total_tokens=2,
            )
            for arm, rate in (("a", 1.0), ("b", 0.98))
            for number, right in enumerate(random.random(100) < rate)
        ]  # fmt: skip
        found = lost_answers(rows, "a", "b")
        hits += found.low <= 0.02 <= found.high
    assert hits / runs > 0.9
