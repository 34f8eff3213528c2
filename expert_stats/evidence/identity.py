"""The token-identity null: does an expert go with the thought, or with one token as other experts go with theirs?

A marker that is one constant token in one fixed place always has its top-k experts, so association alone shows nothing there.
The question is whether it stands out among other tokens (`expert_stats.references`): had the name "marker" been given to any of
them at random, how often would one of its experts have been bound to it as closely?
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from expert_stats.evidence.measure import least_support, npmi
from expert_stats.references import References

Array = np.ndarray[Any, Any]

FIXED = 0.95
"""A marker with this share of its occurrences in the opening stands in a fixed place."""
LEAST_SEEN = 10
"""Reference tokens seen less often are not compared."""


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
