"""Scores of all experts from routing counts, with everything that says how far they can be trusted (`expert_stats.evidence`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import numpy as np

from expert_stats.counts import RoutingCounts
from expert_stats.evidence import (
    SHRINK,
    ZERO_JOINT,
    Estimate,
    Halves,
    Identity,
    MarkerEstimate,
    Measure,
    ProblemSums,
    Rival,
    agreement_of_families,
    false_discovery_rate,
    halves_of,
    identity_of,
    least_support,
    measured_by_halves,
    measured_elsewhere,
    npmi,
    problem_sums,
    robust_p,
    uncertainty_of,
    without_each_family,
)
from expert_stats.evidence.measure import FIXED
from expert_stats.scores import ExpertScores

Array = np.ndarray[Any, Any]

P = ParamSpec("P")

BY = ("npmi", "rice")
MISSING_MARKER = ("error", "skip")


def scores_and_estimate(
    counts: RoutingCounts,
    coefficients: Mapping[str, float] | None = None,
    *,
    by: str = "npmi",
    zero_joint: str | None = None,
    min_support: int | None = None,
    missing_marker: str | None = "error",
    rival: Callable[[ProblemSums, Array], Rival] | None = None,
    measured_on: RoutingCounts | None = None,
) -> tuple[ExpertScores, Estimate]:
    """Score every (layer, expert): the sum over markers of coefficient x nPMI (RICE, Eq. 6), with evidence.

    ``coefficients``: name -> c_x; other markers keep the coefficient with which they were counted
    (`MarkerSet.coefficients`: +1 for `<think>`, -1 for `</think>` and "Alternatively", 0 otherwise). ``by``: "npmi" measures
    every marker with a tenth of any tokens mixed in, a quantity that does not move with the number of traces and needs no rule
    for zeros; "rice" is the published formula (`expert_stats.evidence.measure` has both). ``zero_joint``, of "rice" alone: the
    nPMI of a marker at whose tokens the expert was never selected, which RICE does not define: "minus_one" (its limit; the
    default), "half" (as if it had been selected there half a time, but never as an association) or "skip" (nothing). The
    table of nPMI shows Eq. 5 in every case. ``min_support``: joint selections that an expert needs, at a marker of positive
    coefficient with which it is associated (nPMI > 0), to be supported; default a tenth of the marker's occurrences, at least
    3, at most all of them. ``missing_marker``: a marker with a coefficient but without occurrences is an "error", or is left
    out ("skip"). The only positive marker cannot be left out, unless None asks for no marker: then no score is defined.

    The evidence of a cell at a marker of positive coefficient is ``q``. Where the marker stands inside thoughts: the false
    discovery rate of the problem-robust test within the trace's own position bins, over the cells of those markers. Where it
    stands in one fixed place (`<think>`): the share of tokens, among the reference tokens and the marker, with any expert as
    closely bound as this one, times the number of such markers. NaN, no evidence, where the counts cannot tell.

    ``rival``: another measure in place of the sum (`expert_stats.rivals`), with its own score, support, intervals and evidence;
    the tables of the markers stay those of the counts.

    ``measured_on``: counts of other problems, in which what is chosen here is measured; without them, half of the problems measures
    what the other half chooses (`expert_stats.evidence.fresh`). A ``rival`` must then be one of the counts.

    Cells that are undefined are NaN and unsupported. ValueError says what is missing.
    """
    if by not in BY or zero_joint not in (None, *ZERO_JOINT) or missing_marker not in (None, *MISSING_MARKER):
        raise ValueError(
            f"by is {by!r}, zero_joint {zero_joint!r} and missing_marker {missing_marker!r}: "
            f"choose among {BY}, {ZERO_JOINT} and {MISSING_MARKER}"
        )
    if zero_joint is not None and by != "rice":
        raise ValueError(f"zero_joint {zero_joint!r} is a rule of by='rice'; by={by!r} needs none: leave it out")
    if min_support is not None and min_support < 1:
        raise ValueError(
            f"min_support is {min_support}: give a whole number >= 1, or None for a tenth of the occurrences"
        )
    if measured_on is not None:
        refuse_shared(counts, measured_on)
    weights_M = _coefficients(counts, coefficients)
    marker_M = counts.occurrences_M
    measure = Measure(weights_M, by, zero_joint or ZERO_JOINT[0])
    sums = problem_sums(counts, weights_M > 0)
    other = rival(sums, weights_M) if rival else None
    _refuse_missing(counts, weights_M, marker_M, None if other and other.claim else missing_marker)
    joint_MC, expert_C, _, total = totals = sums.rows(slice(None))
    identity = identity_of(*totals, counts.references)
    p_MC, q_MC, tests = _evidence(sums, identity, weights_M, marker_M)
    robust = tuple(index for index, test in enumerate(tests) if test == "robust")

    def estimate_of(own: ProblemSums) -> Estimate:
        return rival(own, weights_M).estimate if rival else MarkerEstimate(own, measure, min_support, robust)

    estimate = other.estimate if other else estimate_of(sums)
    score_C = estimate.score(slice(None))
    supported_C = np.isfinite(score_C) & estimate.supported(slice(None))
    # Over these the lower bounds hold: whatever could come to be chosen.
    candidates_C = supported_C if other else np.asarray((joint_MC[weights_M > 0] >= 1).any(0))
    q_C = _lowest(q_MC[weights_M > 0])
    if other and other.claim:
        q_C = false_discovery_rate(np.where(supported_C, other.estimate.p(), np.nan))
    sure = uncertainty_of(estimate, candidates_C, supported_C)
    without_score_C, without_p_C = without_each_family(estimate)
    shape = (len(counts.moe_layers), counts.num_experts)
    halves = halves_of(estimate)
    if measured_on is None:
        fresh = measured_by_halves(estimate, halves, counts.moe_layers, counts.num_experts)
    else:
        elsewhere = estimate_of(problem_sums(measured_on, weights_M > 0))
        fresh = measured_elsewhere(score_C, supported_C, elsewhere, counts.moe_layers, counts.num_experts)
    scores = ExpertScores(
        model=dict(counts.signature.model),
        marker_names=counts.marker_names,
        coefficients=tuple(weights_M.tolist()),
        num_traces=counts.num_traces,
        num_problems=0 if counts.cannot_answer else len(sums.problems),
        num_tokens=total,
        occurrences=tuple(marker_M.tolist()),
        counts_digest=counts.digest(),
        options={
            "by": other.name if other else by,
            "zero_joint": measure.zero_joint if by == "rice" else None,
            "shrink": SHRINK if by == "npmi" and not other else 0.0,
            "min_support": [least_support(min_support, int(seen)) for seen in marker_M],
            "missing_marker": missing_marker,
            **{key: counts.signature.to_dict()[key] for key in ("base", "prompt_tail", "counted")},
            **{key: counts.signature.markers.get(key) for key in ("position", "token", "repeats", "whole_words")},
        },
        method={
            "words": other.words if other else "",
            "claim": other.claim if other else "",
            "signed": other is not None and other.estimate.signed,
            "problems": len(estimate.problems),
        },
        tests=tests,
        cannot_answer=counts.cannot_answer,
        tokens=_tokens(counts, identity),
        families=agreement_of_families(estimate),
        fresh=fresh,
        npmi_MLE=npmi(joint_MC, expert_C, marker_M[:, None], np.array(total)).reshape(-1, *shape),
        joint_MLE=joint_MC.reshape(-1, *shape),
        p_MLE=p_MC.reshape(-1, *shape),
        q_MLE=q_MC.reshape(-1, *shape),
        q_LE=q_C.reshape(shape),
        rank_MLE=identity.rank_MC.reshape(-1, *shape),
        expert_LE=expert_C.reshape(shape),
        score_LE=score_C.reshape(shape),
        error_LE=sure.error_C.reshape(shape),
        low_LE=sure.low_C.reshape(shape),
        high_LE=sure.high_C.reshape(shape),
        bound_LE=sure.bound_C.reshape(shape),
        chance_TLE=sure.chance_TC.reshape(-1, *shape),
        without_score_LE=without_score_C.reshape(shape),
        without_p_LE=without_p_C.reshape(shape),
        supported_LE=supported_C.reshape(shape),
        halves=Halves(*(half.reshape(shape) for half in halves)),
    )
    return scores, estimate


def _scores(function: Callable[P, tuple[ExpertScores, Estimate]]) -> Callable[P, ExpertScores]:
    """A function that returns the scores alone, with the options of one that also returns their estimate."""

    @wraps(function)
    def scores(*args: P.args, **options: P.kwargs) -> ExpertScores:
        return function(*args, **options)[0]

    scores.__name__ = "score_experts"
    scores.__signature__ = signature(function).replace(return_annotation="ExpertScores")  # type: ignore[attr-defined]
    return scores


score_experts = _scores(scores_and_estimate)


def refuse_shared(counts: RoutingCounts, measured_on: RoutingCounts) -> None:
    """ValueError, in a line, where one cannot be measured in the other: counts of another kind, or problems in both."""
    if difference := counts.signature.difference(measured_on.signature):
        raise ValueError(f"what is chosen from counts cannot be measured in counts of another kind: {difference}")
    if old := counts.cannot_answer or measured_on.cannot_answer:
        raise ValueError(f"which problems chose cannot be told: {old}")
    if shared := {one.problem for one in counts.traces} & {one.problem for one in measured_on.traces}:
        raise ValueError(
            f"problem {min(shared)!r} and {len(shared) - 1} others would choose experts and measure them: measure in counts of "
            "other problems"
        )
    if not measured_on.num_tokens:
        raise ValueError("the counts to measure in hold no tokens: count at least two problems")


def _lowest(q_MC: Array) -> Array:
    """The smallest q of every cell; NaN without any."""
    lowest_C = np.where(np.isnan(q_MC), np.inf, q_MC).min(0, initial=np.inf)
    return np.where(np.isfinite(lowest_C), lowest_C, np.nan)


def _evidence(
    sums: ProblemSums, identity: Identity, weights_M: Array, marker_M: Array
) -> tuple[Array, Array, tuple[str, ...]]:
    """p [M, C], q [M, C], and by marker the test behind them: "robust", "tokens", or "" for none."""
    num_cells = sums.expert_PC.shape[1]
    p_MC = np.full((len(weights_M), num_cells), np.nan)
    q_MC, tests = p_MC.copy(), [""] * len(weights_M)
    for index in np.flatnonzero((weights_M > 0) & (marker_M > 0)).tolist():
        if sums.opening_M[index] >= FIXED * marker_M[index]:
            tests[index], p_MC[index] = "tokens", identity.p_MC[index]
        else:
            tests[index], p_MC[index] = "robust", robust_p(sums.excess_of(index), num_cells)[1]
    robust, tokens = (np.array([test == name for test in tests]) for name in ("robust", "tokens"))
    q_MC[robust] = false_discovery_rate(p_MC[robust])
    q_MC[tokens] = np.minimum(p_MC[tokens] * tokens.sum(), 1.0)
    return p_MC, q_MC, tuple(tests)


def _tokens(counts: RoutingCounts, identity: Identity) -> dict[str, Any]:
    """Where the markers stand among the reference tokens, as plain values."""
    known = counts.references
    tops = [] if known is None else [None if np.isnan(top) else float(top) for top in identity.top_R]
    named = [] if known is None else list(zip(known.tokens, known.texts, known.seen_R.tolist(), tops, strict=True))
    return {
        "compared": identity.num,
        "rank": [identity.rank_of(index) for index in range(len(counts.marker_names))],
        "top": [None if np.isnan(top) else float(top) for top in identity.top_M],
        "references": [list(row) for row in sorted(named, key=lambda row: (-(row[3] or -2.0), row[0]))],
    }


def _coefficients(counts: RoutingCounts, given: Mapping[str, float] | None) -> Array:
    names = counts.marker_names
    unknown = sorted(set(given or {}) - set(names))
    if unknown:
        raise ValueError(f"a coefficient is given for {unknown[0]!r}, the counts have the markers {list(names)}")
    own = dict(zip(names, counts.signature.markers["coefficients"], strict=True))
    weights = [float(value) for value in {**own, **(given or {})}.values()]
    if not all(map(math.isfinite, weights)) or max(weights) <= 0:
        raise ValueError(
            f"the coefficients are {dict(zip(names, weights, strict=True))}: at least one must be positive, all finite"
        )
    return np.array(weights)


def _refuse_missing(counts: RoutingCounts, weights_M: Array, marker_M: Array, rule: str | None) -> None:
    """``rule``: None where the score needs no marker."""
    if not counts.num_tokens:
        raise ValueError("the counts hold no tokens: collect them from at least one trace")
    missing = [
        name for name, weight, seen in zip(counts.marker_names, weights_M, marker_M, strict=True) if weight and not seen
    ]
    if missing and rule == "error":
        raise ValueError(
            f"marker {missing[0]!r} never occurs in the {counts.num_traces} traces: count more traces, give it the coefficient 0, "
            "or leave it out with missing_marker='skip'"
        )
    if rule and not (marker_M[weights_M > 0] > 0).any():
        raise ValueError(
            f"no marker of positive coefficient occurs in the {counts.num_traces} traces ({', '.join(missing)} do not): count more or "
            "longer answers, or give a token that occurs in them a coefficient above 0 (--coefficients NAME=1)"
        )
