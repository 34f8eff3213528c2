"""The score of an expert as a function of its sums: nPMI (RICE, arXiv 2505.14681, Eq. 2-6) and its shrunk form, with derivatives.

Dimension letters: M markers, C cells (layers x experts, row by row). Sums over traces: joint, expert, marker, total.

**One estimand at any number of traces.** The nPMI of an expert that is never selected at a marker is -1 in the limit, and what a
sample without a joint selection says of it moves with the size of the sample. ``by="npmi"`` measures the marker's tokens with a
tenth of any tokens mixed in, p'(E|x) = 0.9 p(E|x) + 0.1 p(E), for every marker alike: a fixed quantity that needs no rule for
zeros, at least log2(0.1) bits. ``by="rice"`` is the published formula, with a rule for zeros, which the paper lacks.

**Token identity** (`identity_of`): does an expert go with the thought, or with one token as other experts go with theirs?
A marker that is one constant token in one fixed place always has its top-k experts, so association alone shows nothing there.
The question is whether it stands out among other tokens (`expert_stats.trace_counts`): had the name "marker" been given to any of
them at random, how often would one of its experts have been bound to it as closely?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from expert_stats.trace_counts import References

Array = np.ndarray[Any, Any]

SHRINK = 0.1
ZERO_JOINT = ("minus_one", "half", "skip")
FIXED = 0.95
"""A marker with this share of its occurrences in the opening stands in a fixed place."""
LEAST_SEEN = 10
"""Reference tokens seen less often are not compared."""


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
        bound = _log2_ratio(joint, marker) + _log2_ratio(total, expert)
        value = np.clip(bound / _log2_ratio(total, joint), -1.0, 1.0)
    value = np.where(joint == 0, -1.0, value)
    return np.where((expert == 0) | (marker == 0) | (joint == total), np.nan, value)


def _log2_ratio(over: Array, under: Array) -> Array:
    """log2(over / under). The difference of two logarithms loses the digits of a ratio close to 1: all of them at 2^49 tokens."""
    over, under = over.astype(np.float64), under.astype(np.float64)
    plain, excess = np.log2(over) - np.log2(under), (over - under) / under
    return np.where(np.abs(excess) < 1e-3, np.log1p(excess) / math.log(2), plain)


class Slopes(NamedTuple):
    """Derivatives of the score: joint [M, C], marker [M, C], expert [C], total [C]."""

    joint_MC: Array
    marker_MC: Array
    expert_C: Array
    total_C: Array


@dataclass(frozen=True)
class Measure:
    """The sum over markers of coefficient x term. Markers without occurrences or with coefficient 0 add nothing."""

    weights_M: Array
    by: str = "npmi"
    zero_joint: str = "minus_one"
    """Of ``by="rice"``: the term of a marker with no joint selection: "minus_one" (the limit), "half" (as if half of one, at
    most 0) or "skip" (0)."""

    def score(self, joint: Array, expert: Array, marker: Array, total: Array | int) -> Array:
        """``joint`` [..., M, C], ``expert`` [..., C], ``marker`` [..., M], ``total`` [...] -> [..., C].

        NaN where a term is undefined, and everywhere when no marker of positive coefficient occurs.
        """
        marker, total = np.asarray(marker), np.asarray(total)
        result = np.zeros(np.broadcast_shapes(expert.shape, joint.shape[:-2] + joint.shape[-1:]))
        for index in np.flatnonzero(self.weights_M).tolist():
            seen = marker[..., index, None]
            term = self.term(joint[..., index, :], expert, seen, total[..., None])
            result = result + np.where(seen > 0, self.weights_M[index] * term, 0.0)
        starts = np.asarray((marker[..., self.weights_M > 0] > 0).any(-1))
        return np.where(starts[..., None], result, np.nan)

    def term(self, joint: Array, expert: Array, marker: Array, total: Array) -> Array:
        """One marker's nPMI under this measure."""
        if self.by == "npmi":
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (1 - SHRINK) * joint / marker + SHRINK * expert / total
                value = np.log(share * total / expert) / -np.log(share * marker / total)
            return np.where((expert == 0) | (marker == 0) | (joint == total), np.nan, np.minimum(value, 1.0))
        value = npmi(joint, expert, marker, total)
        if self.zero_joint == "minus_one":
            return value
        half = np.minimum(npmi(np.array(0.5), expert, marker, total), 0.0) if self.zero_joint == "half" else 0.0
        return np.where((joint == 0) & np.isfinite(value), half, value)

    def slopes(self, joint_MC: Array, expert_C: Array, marker_M: Array, total: int) -> Slopes:
        """Derivatives at the sums; 0 where RICE's rule for zeros holds, NaN where the term is undefined."""
        joint_slope, marker_slope = np.zeros(joint_MC.shape), np.zeros(joint_MC.shape)
        expert_slope, total_slope = np.zeros(expert_C.shape), np.zeros(expert_C.shape)
        mixed = SHRINK if self.by == "npmi" else 0.0
        for index in np.flatnonzero((self.weights_M != 0) & (marker_M > 0)).tolist():
            joint, seen, weight = joint_MC[index], int(marker_M[index]), self.weights_M[index]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (1 - mixed) * joint / seen + mixed * expert_C / total
                gain, size = np.log(share * total / expert_C), -np.log(share * seen / total)
                by_share = (size + gain) / (size**2 * share)
                parts: tuple[Array, ...] = (
                    by_share * (1 - mixed) / seen,
                    -by_share * (1 - mixed) * joint / seen**2 + gain / size**2 / seen,
                    by_share * mixed / total - 1 / (expert_C * size),
                    -by_share * mixed * expert_C / total**2 + (1 / size - gain / size**2) / total,
                )
            if not mixed:
                parts = tuple(np.where(joint == 0, 0.0, part) for part in parts)
            joint_slope[index], marker_slope[index] = weight * parts[0], weight * parts[1]
            expert_slope, total_slope = expert_slope + weight * parts[2], total_slope + weight * parts[3]
        return Slopes(joint_slope, marker_slope, expert_slope, total_slope)

    def unseen_variance(self, joint_MC: Array, expert_C: Array, marker_M: Array, total: int) -> Array:
        """What traces without a joint selection cannot show: the variance [C] that half a selection more would have.

        p(E|x) from few selections varies by more than its sample says; where there is none, the sample says nothing at all. The
        step is that of the add-half estimate's deviation beyond the sample's own, through the score itself.
        """
        result = np.zeros(expert_C.shape)
        for index in np.flatnonzero((self.weights_M != 0) & (marker_M > 0)).tolist():
            joint, seen = joint_MC[index], int(marker_M[index])
            plain, half = joint / seen, (joint + 0.5) / (seen + 1)
            step = np.sqrt(np.maximum(half * (1 - half) - plain * (1 - plain), 0.0) * seen)
            moved = self.term(np.minimum(joint + step, seen), expert_C, np.array(seen), np.array(total))
            result += (
                self.weights_M[index] * (moved - self.term(joint, expert_C, np.array(seen), np.array(total)))
            ) ** 2
        return result


def least_support(min_support: int | None, occurrences: int) -> int:
    """Joint selections that a cell needs: the given number, or a tenth of the occurrences, at least 3, at most all."""
    return min_support if min_support is not None else max(min(3, occurrences), math.ceil(occurrences / 10))


def supported_cells(
    joint_MC: Array, expert_C: Array, marker_M: Array, total: int, weights_M: Array, min_support: int | None
) -> Array:
    """Cells [C] with enough joint selections at a marker of positive coefficient with which they are associated (nPMI > 0)."""
    least_M = np.array([least_support(min_support, int(seen)) for seen in marker_M])
    value_MC = npmi(joint_MC, expert_C, marker_M[:, None], np.array(total))
    enough_MC = (joint_MC >= least_M[:, None]) & (value_MC > 0)  # NaN > 0 is false: never seen, not supported
    return np.asarray(enough_MC[weights_M > 0].any(axis=0))


class Identity(NamedTuple):
    """Ranks count from 1: the marker, and the references that are as close or closer."""

    num: int
    """Reference tokens compared with."""
    rank_MC: Array
    """Of the marker at each expert, among the references at the same expert; 0 where undefined."""
    p_MC: Array
    """Family-wise: the share, marker included, of tokens with any expert as closely bound; NaN where undefined or without
    references."""
    top_M: Array
    """The largest nPMI of every marker."""
    top_R: Array
    """That of every reference; NaN for those not compared."""

    def rank_of(self, marker: int) -> int:
        """The marker among the references by its closest expert; 0 without one."""
        if not np.isfinite(self.top_M[marker]):
            return 0
        return 1 + int((self.top_R >= self.top_M[marker]).sum())


def identity_of(
    joint_MC: Array, expert_C: Array, marker_M: Array, total: int, references: References | None
) -> Identity:
    """Where every marker stands among the reference tokens, by nPMI; only cells with enough joint selections are compared."""
    num_cells = len(expert_C)
    joint_RC = (
        references.joint_RLE.reshape(-1, num_cells) if references is not None else np.zeros((0, num_cells), np.int64)
    )
    seen_R = references.seen_R if references is not None else np.zeros(0, np.int64)
    value_RC = _closeness(joint_RC, expert_C, seen_R, total)
    value_RC[seen_R < min(LEAST_SEEN, int(marker_M.max(initial=1)))] = np.nan
    top_R, value_MC = _tops(value_RC), _closeness(joint_MC, expert_C, marker_M, total)
    compared = np.isfinite(top_R)
    num = int(compared.sum())
    rank_MC = np.zeros(joint_MC.shape, np.int64)
    p_MC = np.full(joint_MC.shape, np.nan)
    ordered = np.sort(top_R[compared])
    for index, value_C in enumerate(value_MC):
        defined = np.isfinite(value_C)
        if not num or not defined.any():
            continue
        with np.errstate(invalid="ignore"):
            rank_MC[index] = np.where(defined, 1 + (value_RC >= value_C).sum(0), 0)
        as_close_C = num - np.searchsorted(ordered, value_C[defined], side="left")
        p_MC[index, defined] = (1 + as_close_C) / (num + 1)
    return Identity(num, rank_MC, p_MC, _tops(value_MC), top_R)


def _closeness(joint_XC: Array, expert_C: Array, seen_X: Array, total: int) -> Array:
    value_XC = npmi(joint_XC, expert_C, seen_X[:, None], np.array(total))
    least_X = np.array([least_support(None, int(seen)) for seen in seen_X]).reshape(-1, 1)
    return np.where((joint_XC >= least_X) & (joint_XC > 0), value_XC, np.nan)


def _tops(value_XC: Array) -> Array:
    filled = np.where(np.isfinite(value_XC), value_XC, -np.inf).max(-1, initial=-np.inf)
    return np.where(np.isfinite(filled), filled, np.nan)
