"""The score of RICE (arXiv 2505.14681, Eq. 2-6): normalised pointwise mutual information of markers and experts, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from expert_stats.counts import RoutingCounts
from expert_stats.scores import ExpertScores, Halves, false_discovery_rate, interval, jackknife_error, upper_tail

Array = np.ndarray[Any, Any]

ZERO_JOINT = ("half", "skip", "minus_one")
MISSING_MARKER = ("error", "skip")


def npmi(joint: Array, expert: Array, marker: Array, total: Array) -> Array:
    """nPMI of counts that broadcast together, float64 (Eq. 5)::

        [log2(joint / marker) + log2(total / expert)] / log2(total / joint)

    NaN where the expert or the marker was never seen, and where both are at every token (0/0); -1, the limit, where both
    were seen but never together. Always together gives 1, independence 0.

    >>> [float(npmi(*map(np.array, counts))) for counts in [(4, 8, 4, 1024), (4, 4, 4, 1024), (1, 32, 32, 1024)]]
    [0.875, 1.0, 0.0]
    """
    joint, expert, marker, total = np.broadcast_arrays(joint, expert, marker, total)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_joint, log_expert, log_marker, log_total = (
            np.log2(x.astype(np.float64)) for x in (joint, expert, marker, total)
        )
        value = np.clip(((log_joint - log_marker) + (log_total - log_expert)) / (log_total - log_joint), -1.0, 1.0)
    value = np.where(joint == 0, -1.0, value)
    return np.where((expert == 0) | (marker == 0) | (joint == total), np.nan, value)


def score_experts(
    counts: RoutingCounts,
    coefficients: Mapping[str, float] | None = None,
    *,
    zero_joint: str = "half",
    min_support: int | None = None,
    missing_marker: str = "error",
) -> ExpertScores:
    """Score every (layer, expert): the sum over markers of coefficient x nPMI (Eq. 6), with support, interval and null.

    ``coefficients``: name -> c_x; other markers keep the coefficient with which they were counted
    (`MarkerSet.coefficients`: +1 for `<think>`, -1 for `</think>` and "Alternatively", 0 otherwise). ``zero_joint``: the
    nPMI of a marker at whose tokens the expert was never selected; RICE does not define it. "half" (default): as if it had
    been selected there half a time, but never as an association: about -0.3 for an expert that fires often elsewhere, 0 for
    a rare one. "skip": nothing. "minus_one": the limit of nPMI. From one joint selection to none the score moves little
    with "half", by up to 0.3 the wrong way with "skip", and by 0.7 or more with "minus_one": there a single token of a
    negative marker decides the ranking, and scores exceed the 0.4-0.7 that RICE reports. The table of nPMI shows -1 in
    every case. ``min_support``: joint selections that an expert needs, at a marker of positive coefficient with which it is
    associated (nPMI > 0), to be supported; default a tenth of the marker's occurrences, at least 3, at most all of them.
    ``missing_marker``: a marker with a coefficient but without occurrences is an "error", or is left out ("skip"). The only
    positive marker cannot be left out.

    No smoothing. Cells that are undefined are NaN and unsupported. ValueError says what is missing.
    """
    if zero_joint not in ZERO_JOINT or missing_marker not in MISSING_MARKER:
        raise ValueError(
            f"zero_joint is {zero_joint!r} and missing_marker {missing_marker!r}: choose among {ZERO_JOINT} and {MISSING_MARKER}"
        )
    if min_support is not None and min_support < 1:
        raise ValueError(
            f"min_support is {min_support}: give a whole number >= 1, or None for a tenth of the occurrences"
        )
    weights_M = _coefficients(counts, coefficients)
    arrays = counts.grouped()
    used = np.flatnonzero(arrays["num_traces_G"]).tolist()
    joint_MLE, expert_LE, marker_M, total = _among(arrays, used)
    _refuse_missing(counts, weights_M, marker_M, missing_marker)

    npmi_MLE = npmi(joint_MLE, expert_LE, marker_M[:, None, None], np.array(total))
    score_LE = combine(joint_MLE, expert_LE, marker_M, total, weights_M, zero_joint)
    supported_LE = np.isfinite(score_LE) & _supported(npmi_MLE, joint_MLE, marker_M, weights_M, min_support)

    replicates = np.array(
        [combine(*_without(arrays, group), weights_M, zero_joint) for group in used] or [np.full_like(score_LE, np.nan)]
    )
    error_LE = jackknife_error(replicates)
    low_LE, high_LE = interval(score_LE, error_LE, len(used))
    p_MLE = upper_tail(joint_MLE, expert_LE, marker_M, total)
    return ExpertScores(
        model=dict(counts.signature.model),
        marker_names=counts.marker_names,
        coefficients=tuple(weights_M.tolist()),
        num_traces=counts.num_traces,
        num_tokens=total,
        occurrences=tuple(marker_M.tolist()),
        counts_digest=counts.digest(),
        options={
            "zero_joint": zero_joint,
            "min_support": [_least(min_support, int(seen)) for seen in marker_M],
            "missing_marker": missing_marker,
            "smoothing": "none",
            **{key: counts.signature.to_dict()[key] for key in ("base", "prompt_tail", "counted")},
            **{key: counts.signature.markers.get(key) for key in ("position", "token", "repeats", "whole_words")},
        },
        npmi_MLE=npmi_MLE,
        joint_MLE=joint_MLE,
        p_MLE=p_MLE,
        q_MLE=false_discovery_rate(p_MLE),
        expert_LE=expert_LE,
        score_LE=score_LE,
        error_LE=error_LE,
        low_LE=low_LE,
        high_LE=high_LE,
        supported_LE=supported_LE,
        halves=Halves(*(combine(*_among(arrays, used[start::2]), weights_M, zero_joint) for start in (0, 1))),
    )


def combine(
    joint_MLE: Array, expert_LE: Array, marker_M: Array, total: int, weights_M: Array, zero_joint: str
) -> Array:
    """Eq. 6, [L, E]. Markers without occurrences or with coefficient 0 add nothing; an undefined nPMI makes the score NaN.

    All NaN when no marker of positive coefficient occurs.
    """
    if not (marker_M[weights_M > 0] > 0).any():
        return np.full(expert_LE.shape, np.nan)
    used = (marker_M > 0) & (weights_M != 0)
    joint, marker, everything = joint_MLE[used], marker_M[used, None, None], np.array(total)
    terms = npmi(joint, expert_LE, marker, everything)
    if zero_joint != "minus_one":
        half = np.minimum(npmi(np.array(0.5), expert_LE, marker, everything), 0.0)
        terms = np.where((joint == 0) & np.isfinite(terms), half if zero_joint == "half" else 0.0, terms)
    return np.asarray((terms * weights_M[used, None, None]).sum(axis=0))


def _without(arrays: Mapping[str, Array], group: int) -> tuple[Array, Array, Array, int]:
    kept = [array.sum(0) - array[group] for array in arrays.values()]
    return kept[0], kept[1], kept[2], int(kept[3])


def _among(arrays: Mapping[str, Array], groups: list[int]) -> tuple[Array, Array, Array, int]:
    kept = [array[groups].sum(0) for array in arrays.values()]
    return kept[0], kept[1], kept[2], int(kept[3])


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


def _refuse_missing(counts: RoutingCounts, weights_M: Array, marker_M: Array, rule: str) -> None:
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
    if not (marker_M[weights_M > 0] > 0).any():
        raise ValueError(
            f"no marker of positive coefficient occurs in the {counts.num_traces} traces ({', '.join(missing)} do not)"
        )


def _supported(npmi_MLE: Array, joint_MLE: Array, marker_M: Array, weights_M: Array, min_support: int | None) -> Array:
    least_M = np.array([_least(min_support, int(seen)) for seen in marker_M])
    enough_MLE = (joint_MLE >= least_M[:, None, None]) & (npmi_MLE > 0)  # NaN > 0 is false: never seen, not supported
    return np.asarray(enough_MLE[weights_M > 0].any(axis=0))


def _least(min_support: int | None, occurrences: int) -> int:
    return min_support if min_support is not None else max(min(3, occurrences), math.ceil(occurrences / 10))
