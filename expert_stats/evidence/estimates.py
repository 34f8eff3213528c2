"""What a score is a function of, and how every problem moves it: one interface for all the measures that rank experts.

`MarkerEstimate` is nPMI at the markers; `RatioEstimate` a sum of ratios of sums over problems, which all its rivals are. Errors,
bounds, halves, families and agreements ask for no more than this. P problems, M markers, C cells (layers x experts), R replicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import scipy

from expert_stats.evidence.measure import Measure, supported_cells
from expert_stats.evidence.sums import ProblemSums, robust_p

Array = np.ndarray[Any, Any]
Totals = tuple[Array, Array, Array, int]
"""joint_MC, expert_C, marker_M, total."""


class Estimate(Protocol):
    """A score [C] of some problems."""

    @property
    def problems(self) -> tuple[str, ...]: ...
    @property
    def families(self) -> tuple[str, ...]:
        """Of every problem; "" where none is named."""

    def score(self, rows: Array | slice) -> Array:
        """[C], from the problems of these rows alone."""

    def supported(self, rows: Array | slice) -> Array:
        """[C], whether these problems say enough of a cell for it to be chosen."""

    def selected(self, rows: Array | slice) -> Array:
        """[C], whether these problems select the cell at all."""

    def replicates(self, cells: Array, weights_RP: Array) -> Array:
        """[R, cells], every problem counted as often as its weight says."""

    def influence(self, cells: Any) -> Array:
        """[P, cells]: what each problem adds to the score, to first order; a column adds up to 0."""

    def left_out(self, rows: Array | slice, cells: Any) -> Array:
        """[P of these rows, cells]: the score of the rest, one of these problems left out at a time."""

    def unseen(self, rows: Array | slice = slice(None)) -> Array:
        """[C]: variance that the sample, of all problems or of these rows, cannot show."""

    def lowest(self, deviations: float, error_C: Array) -> Array:
        """[C]: how far below the score its lower bound lies, at so many deviations."""

    def p_without(self, family: str) -> Array:
        """[C]: p of the score's own test without a family; NaN where it has none."""


def family_names(families: tuple[str, ...]) -> list[str]:
    """The families that problems name, sorted."""
    return sorted({name for name in families if name})


@dataclass(frozen=True, eq=False)
class MarkerEstimate:
    """nPMI, or the published formula, at the markers. ``tested``: markers whose robust test counts."""

    sums: ProblemSums
    measure: Measure
    min_support: int | None
    tested: tuple[int, ...] = ()
    _kept: dict[str | bytes, Totals] = field(default_factory=dict, init=False, repr=False)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.sums.problems

    @property
    def families(self) -> tuple[str, ...]:
        return self.sums.families

    def score(self, rows: Array | slice) -> Array:
        return self.measure.score(*self._rows(rows))

    def supported(self, rows: Array | slice) -> Array:
        return supported_cells(*self._rows(rows), self.measure.weights_M, self.min_support)

    def selected(self, rows: Array | slice) -> Array:
        return np.asarray(self.sums.expert_PC[rows].any(axis=0))

    def replicates(self, cells: Array, weights_RP: Array) -> Array:
        sums, measure = self.sums, self.measure
        joint_RMC = np.zeros((len(weights_RP), len(measure.weights_M), len(cells)), np.float32)
        for index in np.flatnonzero(measure.weights_M).tolist():
            joint_RMC[:, index] = weights_RP @ sums.joint_PMC[:, index][:, cells].astype(np.float32)
        expert_RC = weights_RP @ sums.expert_PC[:, cells].astype(np.float32)
        marker_RM, total_R = weights_RP @ sums.marker_PM, weights_RP @ sums.total_P
        return measure.score(joint_RMC, expert_RC, marker_RM, total_R)

    def influence(self, cells: Any) -> Array:
        sums, measure = self.sums, self.measure
        joint_MC, expert_C, marker_M, total = self._totals
        slopes = measure.slopes(joint_MC[:, cells], expert_C[cells], marker_M, total)
        result = sums.expert_PC[:, cells] * slopes.expert_C
        result += np.multiply.outer(sums.total_P.astype(float), slopes.total_C)
        for index in np.flatnonzero((measure.weights_M != 0) & (marker_M > 0)).tolist():
            result += sums.joint_PMC[:, index, cells] * slopes.joint_MC[index]
            result += np.multiply.outer(sums.marker_PM[:, index].astype(float), slopes.marker_MC[index])
        return np.asarray(result)

    def left_out(self, rows: Array | slice, cells: Any) -> Array:
        sums = self.sums
        joint_MC, expert_C, marker_M, total = self._rows(rows)
        return self.measure.score(
            joint_MC[:, cells] - sums.joint_PMC[rows][..., cells],
            expert_C[cells] - sums.expert_PC[rows][:, cells],
            marker_M - sums.marker_PM[rows],
            total - sums.total_P[rows],
        )

    def unseen(self, rows: Array | slice = slice(None)) -> Array:
        return self.measure.unseen_variance(*self._rows(rows))

    def lowest(self, deviations: float, error_C: Array) -> Array:
        """So many deviations, or what a count as uncertain as this one may be too high.

        What is chosen is where few selections came out high by luck. There the deviation, taken from the count itself, is right
        above and too small below: the lower end of a count is a gamma quantile, with as many selections as give this relative error.
        """
        totals = self._totals
        slopes_MC = self.measure.slopes(*totals).joint_MC
        by_log_C = np.asarray((totals[0] * slopes_MC)[self.measure.weights_M > 0].sum(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            count_C = np.clip((by_log_C / error_C) ** 2, 1e-3, 1e9)
            share_C = scipy.stats.gamma.ppf(scipy.stats.norm.sf(deviations), count_C) / count_C
            down_C = -np.log(np.maximum(share_C, 1e-12)) * np.maximum(by_log_C, 0.0)
        return np.fmax(deviations * error_C, down_C)

    def p_without(self, family: str) -> Array:
        cells = self.sums.expert_PC.shape[1]
        p_C = np.full(cells, np.nan)
        for marker in self.tested:
            p_C = np.fmin(p_C, robust_p(self.sums.excess_of(marker, without=family), cells)[1])
        return p_C

    @property
    def _totals(self) -> Totals:
        return self._rows(slice(None))

    def _rows(self, rows: Array | slice) -> Totals:
        """Kept: each is a sum over a table of a hundred million numbers, and is asked for again and again."""
        key = repr(rows) if isinstance(rows, slice) else rows.tobytes()
        if key not in self._kept:
            self._kept[key] = self.sums.rows(rows)
        return self._kept[key]


@dataclass(frozen=True, eq=False)
class Ratio:
    """coefficient x sum of ``above_PC`` / sum of ``below``, which is [P, C], or [P, 1] where it is the same for all cells."""

    coefficient: float
    above_PC: Array
    below: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class RatioEstimate:
    """A sum of ratios. ``selected_PC``: whether the problem selects the cell; two problems that do are support.

    ``signed``: the question is whether the score is 0 (both sides); else, whether it is above the mean of the cell's layer.
    """

    problems: tuple[str, ...]
    families: tuple[str, ...]
    terms: tuple[Ratio, ...]
    selected_PC: Array
    num_experts: int
    signed: bool

    def score(self, rows: Array | slice) -> Array:
        parts = [(one.coefficient, one.above_PC[rows].sum(0), one.below[rows].sum(0)) for one in self.terms]
        return sum_of_ratios(parts)

    def supported(self, rows: Array | slice) -> Array:
        own_PC = self.selected_PC[rows]
        return np.asarray((own_PC.sum(0) >= min(2, len(own_PC))) & np.isfinite(self.score(rows)))

    def selected(self, rows: Array | slice) -> Array:
        return np.asarray(self.selected_PC[rows].any(axis=0))

    def replicates(self, cells: Array, weights_RP: Array) -> Array:
        return sum_of_ratios(
            [
                (one.coefficient, weights_RP @ one.above_PC[:, cells], weights_RP @ _columns(one.below, cells))
                for one in self.terms
            ]
        )

    def influence(self, cells: Any) -> Array:
        result: Array = np.zeros(())
        for one in self.terms:
            above_PC, below = one.above_PC[:, cells], _columns(one.below, cells)
            with np.errstate(divide="ignore", invalid="ignore"):
                total = below.sum(0)
                result = result + one.coefficient * (above_PC - above_PC.sum(0) / total * below) / total
        return np.asarray(result)

    def left_out(self, rows: Array | slice, cells: Any) -> Array:
        sides = [
            (one.coefficient, one.above_PC[rows][:, cells], _columns(one.below[rows], cells)) for one in self.terms
        ]
        return sum_of_ratios([(share, above.sum(0) - above, below.sum(0) - below) for share, above, below in sides])

    def unseen(self, rows: Array | slice = slice(None)) -> Array:
        return np.zeros(self.selected_PC.shape[1])

    def lowest(self, deviations: float, error_C: Array) -> Array:
        return deviations * error_C

    def p_without(self, family: str) -> Array:
        return self.p([name != family for name in self.families])

    def p(self, rows: list[bool] | None = None) -> Array:
        """Student's t over problems, [C]; NaN where the score is undefined and with fewer than two problems."""
        own = self if rows is None else self._of(np.array(rows))
        num = len(own.problems)
        score_C, influence_PC = own.score(slice(None)), own.influence(slice(None))
        if not self.signed:
            score_C, influence_PC = (self._beyond_layer(table) for table in (score_C, influence_PC))
        if num < 2:
            return np.full(score_C.shape, np.nan)
        error_C = np.sqrt((influence_PC**2).sum(0) * num / (num - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            t_C = np.where((score_C == 0) & (error_C == 0), 0.0, score_C / error_C)
        return np.asarray(2 * scipy.stats.t.sf(np.abs(t_C), num - 1) if self.signed else scipy.stats.t.sf(t_C, num - 1))

    def _beyond_layer(self, table: Array) -> Array:
        """Minus the mean over the experts of the layer whose score is defined."""
        by_layer = table.reshape(*table.shape[:-1], -1, self.num_experts)
        known = np.isfinite(self.score(slice(None))).reshape(-1, self.num_experts)
        mean = np.where(known, by_layer, 0.0).sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
        return np.asarray((by_layer - mean).reshape(table.shape))

    def _of(self, rows: Array) -> RatioEstimate:
        names = [tuple(np.array(side, dtype=object)[rows].tolist()) for side in (self.problems, self.families)]
        return RatioEstimate(
            problems=names[0],
            families=names[1],
            terms=tuple(Ratio(one.coefficient, one.above_PC[rows], one.below[rows]) for one in self.terms),
            selected_PC=self.selected_PC[rows],
            num_experts=self.num_experts,
            signed=self.signed,
        )


def sum_of_ratios(parts: list[tuple[float, Array, Array]]) -> Array:
    """The sum of coefficient x above / below; NaN where a part is 0/0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sum(coefficient * (above / below) for coefficient, above, below in parts))


def _columns(below: Array, cells: Any) -> Array:
    return below if below.shape[1] == 1 else below[:, cells]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rival:
    """A measure of experts other than nPMI."""

    name: str
    words: str
    """What the score is, with its unit."""
    claim: str
    """What its q is evidence of, as a noun; "" where that is the association with the markers."""
    estimate: RatioEstimate
