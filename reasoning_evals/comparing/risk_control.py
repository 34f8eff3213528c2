"""Conformal risk control (Angelopoulos et al., arXiv 2208.02814): a threshold for early exits, with a rate that is not exceeded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reasoning_evals.comparing.statistics import Estimate, proportion_estimate
from reasoning_evals.comparing.tables import cluster_names
from reasoning_evals.runs import GradeRow


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """A place at which a sample could exit."""

    score: float
    """The exit is taken where this is above the threshold."""
    harms: bool
    """Whether an exit here loses a right answer."""


@dataclass(frozen=True, kw_only=True)
class RiskControl:
    """The lowest threshold whose rate is controlled, and what it does on the problems that it was found on."""

    threshold: float
    rate: float
    """The rate that was asked for: the expected share of harmful exits of a new problem's samples is this or less."""
    problems: int
    empirical: float
    """The share on the problems of calibration."""
    exits: float
    """Share of their samples that exit."""


def control_risk(samples: Mapping[str, Sequence[Sequence[ExitPoint]]], rate: float) -> RiskControl:
    """The lowest threshold t with (n R(t) + 1) / (n + 1) <= ``rate``, R(t) being the mean over the n problems.

    ``samples``: problem -> its samples, each the exit points of one thought in order. A sample exits at its first point whose score is
    above t; its loss is whether that exit harms. Because a lower threshold may exit earlier and yet do no harm, that loss need
    not fall with t; what is controlled is the largest loss at any threshold of t or more, which does, and is never less. The samples of a
    problem are averaged: problems are exchangeable, samples of one are not independent.

    The expectation is over the problems of calibration and the new one together, and holds if these are exchangeable: another
    kind of problem, another model, other sampling, and it need not. ValueError where so few problems can state no such rate.
    """
    n = len(samples)
    if not 0 < rate < 1:
        raise ValueError(f"the rate is {rate:g}: give a share above 0 and below 1")
    if not n or 1 / (n + 1) > rate:
        raise ValueError(
            f"{n} problems can state no rate below {1 / (n + 1):.3g}, and {rate:g} is asked for: give at least "
            f"{math.ceil(1 / rate) - 1} problems, or a higher rate"
        )
    # A sample harms at all thresholds below the largest score of a harmful point that it could exit at.
    worst = {
        name: [max((p.score for p in reachable(sample) if p.harms), default=-math.inf) for sample in group]
        for name, group in samples.items()
    }
    candidates = sorted({score for group in worst.values() for score in group if score > -math.inf})
    threshold = candidates[-1] if candidates else 0.0
    for candidate in [0.0, *candidates]:
        risk = np.mean([np.mean([score > candidate for score in group]) for group in worst.values()])
        if (n * risk + 1) / (n + 1) <= rate + 1e-12:
            threshold = candidate
            break
    harmed = [[bool(p and p[0].harms) for p in (taken(s, threshold) for s in group)] for group in samples.values()]
    exits = [[bool(taken(sample, threshold)) for sample in group] for group in samples.values()]
    return RiskControl(
        threshold=threshold,
        rate=rate,
        problems=n,
        empirical=float(np.mean([np.mean(group) for group in harmed])),
        exits=float(np.mean([np.mean(group) for group in exits])),
    )


def reachable(sample: Sequence[ExitPoint]) -> list[ExitPoint]:
    """The points at which some threshold exits: those that are higher than all before them."""
    found: list[ExitPoint] = []
    for point in sample:
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def taken(sample: Sequence[ExitPoint], threshold: float) -> list[ExitPoint]:
    """The exit of a sample at a threshold, as a list of one; empty where it does not exit."""
    return [point for point in sample if point.score > threshold][:1]


def lost_answers(rows: Iterable[GradeRow], baseline: str, arm: str) -> Estimate:
    """The share of samples that the baseline solves and the arm does not, over problems: what a mis-exit rate speaks of, where both
    draw the same random numbers and the arm does nothing but end thoughts."""
    rows = list(rows)
    theirs = {(row.problem_id, row.sample_idx): row.correct for row in rows if row.arm == arm}
    found: dict[str, list[bool]] = {}
    for row in rows:
        if row.arm == baseline:
            lost = row.correct and not theirs[row.problem_id, row.sample_idx]
            found.setdefault(row.problem_id, []).append(lost)
    clusters = cluster_names({row.problem_id: row.cluster_id for row in rows if row.arm == baseline})
    return proportion_estimate([float(np.mean(group)) for group in found.values()], clusters)
