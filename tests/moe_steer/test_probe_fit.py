"""The fit of a probe: against pairs counted one by one, on planted states, with problems on one side of the split alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from moe_steer.gates.probe_fit import auc, fit_probe, is_held_out, judge
from reasoning_evals.comparing import wilson_interval

RNG = np.random.default_rng(0)
PROBLEMS = [f"p{i % 40}" for i in range(800)]
X = RNG.normal(size=(800, 12)) * np.geomspace(0.01, 100, 12)
ODDS = 2.0 * X[:, 3] / X[:, 3].std() - 1.0 * X[:, 9] / X[:, 9].std() + 0.3
Y = RNG.random(800) < 1 / (1 + np.exp(-ODDS))


def test_the_auc_counts_pairs() -> None:
    p = np.round(RNG.random(60), 1)
    y = RNG.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
    assert auc(p, y) == pytest.approx(sum(pairs) / len(pairs))
    said = judge(p, y, [f"{i % 9}" for i in range(60)])
    assert said["low"] < said["auc"] < said["high"]
    assert said["brier"] == pytest.approx(np.mean([(a - b) ** 2 for a, b in zip(p, y, strict=True)]))
    assert sum(one["number"] * one["observed"] for one in said["bins"]) == pytest.approx(y.sum())


def test_a_planted_direction_is_found_and_calibrated() -> None:
    fitted = fit_probe(X, Y, PROBLEMS)
    held = np.array([is_held_out(name, 0.3, 0) for name in PROBLEMS])
    odds = X @ fitted.weight_D + fitted.bias
    assert np.corrcoef(odds, ODDS)[0, 1] > 0.95
    judged = fitted.header["held_out"]
    assert judged["auc"] == pytest.approx(auc(1 / (1 + np.exp(-odds[held])), Y[held]))
    assert judged["low"] < auc(ODDS[held], Y[held]) < judged["high"]
    assert judged["calibration_error"] < 0.1
    assert judged["positions"] == held.sum()
    assert judged["problems"] + fitted.header["trained"]["problems"] == 40
    assert 0.3 < fitted.threshold < 0.8


def test_the_interval_is_of_problems_and_not_of_positions() -> None:
    """Four copies of every position of a problem say nothing new."""
    fitted = fit_probe(X[:200], Y[:200], PROBLEMS[:200])
    again = fit_probe(np.repeat(X[:200], 4, 0), np.repeat(Y[:200], 4), list(np.repeat(PROBLEMS[:200], 4)))
    one, four = (found.header["held_out"] for found in (fitted, again))
    assert four["high"] - four["low"] == pytest.approx(one["high"] - one["low"], rel=0.15)


@pytest.mark.parametrize("digits", [1, 6], ids=["ties", "no ties"])
def test_the_interval_equals_one_that_leaves_each_problem_out_in_turn(digits: int) -> None:
    scores, y, names = np.round(1 / (1 + np.exp(-ODDS)), digits), Y, np.array(PROBLEMS)
    value = auc(scores, y)
    without = np.array([auc(scores[names != one], y[names != one]) for one in set(PROBLEMS)])
    spread = (len(without) - 1) / len(without) * ((without - value) ** 2).sum()
    counts = [np.array([(side & (names == one)).sum() for one in set(PROBLEMS)]) for side in (y, ~y)]
    units = min(number.sum() ** 2 / (number**2).sum() for number in counts)
    trials = value * (1 - value) / spread
    judged = judge(scores, y, PROBLEMS)
    assert (judged["low"], judged["high"]) == pytest.approx(wilson_interval(value * trials, trials, df=units - 1))


def test_noise_is_not_called_a_finding() -> None:
    y = RNG.random(800) < 0.5
    judged = fit_probe(X, y, PROBLEMS).header["held_out"]
    assert judged["low"] < 0.5 < judged["high"]


def test_the_optimum_is_that_of_the_gradient() -> None:
    fitted = fit_probe(X, Y, PROBLEMS, ridge=0.1)
    at = np.array([not is_held_out(name, 0.3, 0) for name in PROBLEMS])
    x, y = X[at], Y[at]
    scale = x.std(0)
    p = 1 / (1 + np.exp(-(x @ fitted.weight_D + fitted.bias)))
    gradient = ((x - x.mean(0)) / scale).T @ (p - y) / len(y) + 0.1 * fitted.weight_D * scale
    assert np.abs(gradient).max() < 1e-3
    assert math.isclose(p.mean(), y.mean(), abs_tol=1e-3)


def test_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="positions to fit on .* have one label only"):
        fit_probe(X, np.ones(800, dtype=bool), PROBLEMS)
    with pytest.raises(ValueError, match="positions to judge on .0 of 0 problems. have one label only"):
        fit_probe(X, Y, PROBLEMS, held_out=1e-9)


def test_the_interval_of_an_auc_near_1_covers_it_with_few_problems() -> None:
    """10 problems of 10 positions: a percentile bootstrap over problems covers in 83% of runs."""
    random, runs, hits = np.random.default_rng(0), 150, 0
    apart = float(np.sqrt(2) * norm.ppf(0.98))
    names = [str(position // 10) for position in range(100)]
    for _ in range(runs):
        y = random.random(100) < 0.3
        found = judge(random.normal(apart * y, 1.0), y, names)
        hits += found["low"] <= 0.98 <= found["high"]
    assert hits / runs > 0.95 - 2 * (0.95 * 0.05 / runs) ** 0.5
    sure = judge(np.array([0.9] * 5 + [0.1] * 5), np.array([True] * 5 + [False] * 5), list("abcdeabcde"))
    assert (sure["auc"], sure["high"]) == (1.0, 1.0)
    assert sure["low"] < 0.7, "no error seen in 5 problems is no certainty"
    alone = judge(np.array([0.9, 0.8, 0.1]), np.array([True, True, False]), ["a", "a", "b"])
    assert (alone["low"], alone["high"]) == (0.0, 1.0)
