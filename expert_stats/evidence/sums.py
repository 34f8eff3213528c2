"""Counts by problem, in one pass over the traces: what intervals, tests, halves and families are computed from.

P problems (the samples of one problem share a row), M markers, C cells (layers x experts), F families, B bins.

`robust_p` tests association in a way that problem kinds and drift do not fool: the excess over a trace's own bins, against its spread over
problems. With nothing associated inside any thought, harder problems have more of a marker and other experts, and both drift with the
position; a test that pools all tokens then finds experts in every run (40 of 40 simulated; here none, tests/bench/evidence.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from expert_stats.counts import RoutingCounts

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Excess:
    """Joint selections beyond what the trace's own bins lead to expect, summed over some problems, for one marker.

    ``sum_C`` and ``square_C`` are over the problems' excess; ``variance_C``: that of drawing the marker's tokens within bins
    (hypergeometric); ``num``: problems whose bins can tell anything.
    """

    sum_C: Array
    square_C: Array
    variance_C: Array
    num: int

    def __add__(self, other: Excess) -> Excess:
        return Excess(
            self.sum_C + other.sum_C,
            self.square_C + other.square_C,
            self.variance_C + other.variance_C,
            self.num + other.num,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ProblemSums:
    """Whole numbers by problem, and the excess of the markers of positive coefficient by family."""

    problems: tuple[str, ...]
    families: tuple[str, ...]
    """Of every problem; "" where none is named."""
    joint_PMC: Array
    expert_PC: Array
    marker_PM: Array
    total_P: Array
    excess: dict[tuple[int, str], Excess]
    """(marker, family) -> excess."""
    opening_M: Array
    """Occurrences of every marker in the opening bin."""

    def rows(self, rows: Array | slice) -> tuple[Array, Array, Array, int]:
        """joint_MC, expert_C, marker_M, total of some problems."""
        return (
            self.joint_PMC[rows].sum(0, dtype=np.int64),
            self.expert_PC[rows].sum(0, dtype=np.int64),
            self.marker_PM[rows].sum(0),
            int(self.total_P[rows].sum()),
        )

    def excess_of(self, marker: int, without: str | None = None) -> Excess | None:
        """Over all problems, or all but those of a family; None when there are none."""
        parts = [part for (index, name), part in self.excess.items() if index == marker and name != without]
        total: Excess | None = None
        for part in parts:
            total = part if total is None else total + part
        return total


def problem_sums(counts: RoutingCounts, positive: Array) -> ProblemSums:
    """One pass. ``positive`` [M]: markers whose excess is wanted."""
    by_problem: dict[tuple[str, str], list[int]] = {}
    for number, trace in enumerate(counts.traces):
        by_problem.setdefault((trace.problem, trace.family), []).append(number)
    sizes = (len(counts.moe_layers), counts.num_experts)
    num, markers, cells = len(by_problem), len(counts.marker_names), sizes[0] * sizes[1]
    largest = max(
        [0, *(int(counts.traces[n].marker_MB.sum(-1).max(initial=0)) for own in by_problem.values() for n in own)]
    )
    most = max([1, *(len(own) for own in by_problem.values())])
    joint_PMC = np.zeros((num, markers, cells), np.uint16 if largest * most < 2**16 else np.int64)
    tokens_P = [sum(int(counts.traces[n].total_B.sum()) for n in own) for own in by_problem.values()]
    expert_PC = np.zeros((num, cells), np.uint32 if max([0, *tokens_P]) < 2**32 else np.int64)
    marker_PM, total_P = np.zeros((num, markers), np.int64), np.array(tokens_P, np.int64)
    opening_M = np.zeros(markers, np.int64)
    excess: dict[tuple[int, str], Excess] = {}
    for row, ((_, family), own) in enumerate(by_problem.items()):
        beyond: dict[int, list[Array]] = {}
        for number in own:
            trace = counts.traces[number]
            expert_BLE, joint_MLE = trace.expert_and_joint(*sizes)
            expert_BC, joint_MC = expert_BLE.reshape(-1, cells), joint_MLE.reshape(markers, cells)
            expert_PC[row] += expert_BC.sum(0, dtype=expert_PC.dtype)
            joint_PMC[row] += joint_MC.astype(joint_PMC.dtype)
            marker_PM[row] += trace.marker_MB.sum(-1)
            opening_M += trace.marker_MB[:, 0]
            if trace.group >= 0:
                continue  # a group of a file of version 1 has no bins
            for index in np.flatnonzero(positive & (trace.marker_MB.sum(-1) > 0)).tolist():
                found = _beyond(expert_BC, joint_MC[index], trace.marker_MB[index], trace.total_B)
                if found is not None:
                    kept = beyond.setdefault(index, [np.zeros(cells), np.zeros(cells)])
                    kept[0] += found[0]
                    kept[1] += found[1]
        for index, (sum_C, variance_C) in beyond.items():
            part = Excess(sum_C, sum_C**2, variance_C, 1)
            known = excess.get((index, family))
            excess[index, family] = part if known is None else known + part
    names = tuple(problem for problem, _ in by_problem)
    return ProblemSums(
        names, tuple(family for _, family in by_problem), joint_PMC, expert_PC, marker_PM, total_P, excess, opening_M
    )


def _beyond(expert_BC: Array, joint_C: Array, marker_B: Array, total_B: Array) -> tuple[Array, Array] | None:
    """Joint minus expected, and its variance, within the bins that hold the marker and other tokens; None without such a bin.

    A bin that holds the marker alone adds what it expects to both sides.
    """
    bins = np.flatnonzero(marker_B)
    if not (marker_B[bins] < total_B[bins]).any():
        return None
    marker, total, fired = marker_B[bins].astype(float), total_B[bins].astype(float), expert_BC[bins].astype(float)
    spread = marker * (total - marker) / (np.maximum(total - 1, 1) * total)
    return joint_C - (marker / total) @ fired, spread @ fired - (spread / total) @ fired**2


def robust_p(excess: Excess | None, num_cells: int) -> tuple[Array, Array]:
    """z [C] and its one-sided p [C]: the summed excess over its standard deviation, Student's t with one degree less than problems.

    The deviation is the larger of the problems' own and that of drawing tokens within bins: an expert that is nearly always or
    never on can show no spread by luck. NaN with fewer than two problems, or where neither varies.
    """
    if excess is None or excess.num < 2:
        return np.full(num_cells, np.nan), np.full(num_cells, np.nan)
    num = excess.num
    between_C = np.maximum(excess.square_C - excess.sum_C**2 / num, 0.0) * num / (num - 1)
    spread_C = np.sqrt(np.maximum(between_C, excess.variance_C))
    with np.errstate(divide="ignore", invalid="ignore"):
        z_C = np.where(spread_C > 1e-9, excess.sum_C / spread_C, np.nan)
    return z_C, scipy.stats.t.sf(z_C, num - 1)


def false_discovery_rate(p: Array) -> Array:
    """Benjamini-Hochberg q over all defined cells; NaN stays NaN."""
    defined = np.isfinite(p)
    q = np.full(p.shape, np.nan)
    if defined.any():
        q[defined] = scipy.stats.false_discovery_control(p[defined])
    return q
