"""The interval of a chosen expert from problems that did not choose it: nothing of the choice is left in it.

The best of many score too high in the problems that chose them, by the luck that chose them. In other problems they do not. So half
of the problems choose and the other half measure, each in its turn; or all of them choose, where other counts are there to measure.

The interval is Tukey's jackknife, a problem left out at a time: Student's t of the pseudo-values. Where problems differ in kind a few
carry most of the score, and the spread is known by less than all of them. Satterthwaite's degrees of freedom, num - 1 times 3 over
the kurtosis or about that, are still too many, as a sample shows less kurtosis than there is; squared, that ratio covers (simulated:
tests/bench/evidence.py chosen).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import scipy

from expert_stats.evidence.estimates import Estimate
from expert_stats.evidence.reliability import HALF_ROWS, Halves
from moe_steer.json_files import check_types

Array = np.ndarray[Any, Any]

CHOSEN = 10
"""Experts that a half of the problems chooses."""
EVERY, HALVES = "all problems", ("first half", "second half")
_BLOCK = 512
_FREEDOM = 3
"""Least degrees of freedom: with fewer the interval grows without bound, and covers no more (simulated)."""


class Fresh(NamedTuple):
    """A chosen expert, measured in problems that did not choose it; ``layer`` is absolute."""

    chosen_by: str
    """`EVERY` problem of the counts, or one of the `HALVES`."""
    rank: int
    """Among what was chosen, from 1."""
    layer: int
    expert: int
    problems: int
    """That measure it."""
    score: float
    """In those problems; NaN where they never select the expert."""
    low: float
    high: float
    """95% interval; NaN with fewer than two problems and without a score."""


_NUMBERS = ("score", "low", "high")
_TYPES: dict[str, Any] = {"chosen_by": str, "rank": int, "layer": int, "expert": int, "problems": int}
_TYPES |= dict.fromkeys(_NUMBERS, float | None)


def fresh_record(found: Iterable[Fresh]) -> list[dict[str, Any]]:
    """For JSON: undefined numbers as None."""
    return [{key: None if value != value else value for key, value in one._asdict().items()} for one in found]


def read_fresh(rows: Any) -> tuple[Fresh, ...]:
    """What `fresh_record` made; ValueError or TypeError for anything else."""
    found = []
    for row in rows:
        check_types(row, "fresh", _TYPES)
        found.append(Fresh(**(row | {key: np.nan if row[key] is None else float(row[key]) for key in _NUMBERS})))
        if found[-1].chosen_by not in (EVERY, *HALVES):
            raise ValueError(f"chosen_by is {found[-1].chosen_by!r}")
    return tuple(found)


def measured(estimate: Estimate, rows: Array | slice, cells: Array) -> tuple[Array, Array, Array]:
    """Score and ends of its 95% interval, from the problems of these rows alone, each like ``cells``."""
    parts = [_measured(estimate, rows, cells[at : at + _BLOCK]) for at in range(0, len(cells), _BLOCK)]
    score_C, low_C, high_C = (np.concatenate([np.zeros(0), *side]) for side in zip(*parts, strict=True))
    return score_C, low_C, high_C


def _measured(estimate: Estimate, rows: Array | slice, cells: Array) -> tuple[Array, Array, Array]:
    score_C = estimate.score(rows)[cells]
    left_PC = estimate.left_out(rows, cells)
    num = len(left_PC)
    missing = np.full(score_C.shape, np.nan)
    if num < 2:
        return score_C, missing, missing
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_C = left_PC.mean(0)
        moved_PC = (num - 1) * (mean_C - left_PC)  # pseudo-values about their mean
        square_C = (moved_PC**2).sum(0)
        error_C = np.sqrt(np.maximum(square_C / (num * (num - 1)), estimate.unseen(rows)[cells]))
        kurtosis_C = np.where(square_C > 0, num * (moved_PC**4).sum(0) / square_C**2, 3.0)
        freedom_C = (num - 1) * np.minimum(3 / kurtosis_C, 1) ** 2
        reach_C = error_C * scipy.stats.t.ppf(0.975, np.minimum(np.maximum(freedom_C, _FREEDOM), num - 1))
        centre_C = num * score_C - (num - 1) * mean_C
        low_C, high_C = centre_C - reach_C, centre_C + reach_C
    defined = np.isfinite(low_C) & np.isfinite(high_C)
    return score_C, np.where(defined, low_C, np.nan), np.where(defined, high_C, np.nan)


def measured_by_halves(
    estimate: Estimate, halves: Halves, layers: tuple[int, ...], num_experts: int
) -> tuple[Fresh, ...]:
    """The best `CHOSEN` supported experts of one half of the problems, measured in the other; then the other way round."""
    best = (_best(halves.first, halves.first_supported), _best(halves.second, halves.second_supported))
    found: list[Fresh] = []
    for name, cells, rows in zip(HALVES, best, HALF_ROWS[::-1], strict=True):
        found += _listed(name, cells[:CHOSEN], estimate, rows, layers, num_experts)
    return tuple(found)


def measured_elsewhere(
    score_C: Array, supported_C: Array, elsewhere: Estimate, layers: tuple[int, ...], num_experts: int
) -> tuple[Fresh, ...]:
    """All supported experts, the best first, measured in the problems of another estimate."""
    cells = _best(score_C, supported_C)
    return tuple(_listed(EVERY, cells, elsewhere, slice(None), layers, num_experts))


def _best(score_C: Array, supported_C: Array) -> Array:
    cells = np.flatnonzero(supported_C & np.isfinite(score_C))
    return cells[np.argsort(-score_C[cells], kind="stable")]


def _listed(
    name: str, cells: Array, estimate: Estimate, rows: slice, layers: tuple[int, ...], num_experts: int
) -> list[Fresh]:
    num = len(estimate.problems[rows])
    tables = measured(estimate, rows, cells) if len(cells) else ((),) * 3
    columns = zip(cells.tolist(), *(np.asarray(table).tolist() for table in tables), strict=True)
    return [
        Fresh(name, rank, layers[cell // num_experts], cell % num_experts, num, *values)
        for rank, (cell, *values) in enumerate(columns, start=1)
    ]
