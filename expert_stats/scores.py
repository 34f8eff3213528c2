"""Scores of all experts and their uncertainty: delete-one-group jackknife, split halves, and a test of no association.
Stored as JSON with everything needed to judge and to repeat them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from moe_steer.files import write_whole
from moe_steer.json_files import check_types, parse_json, short

Array = np.ndarray[Any, Any]

_VERSION = 1
_TABLES = {
    "npmi_MLE": np.float64,
    "joint_MLE": np.int64,
    "p_MLE": np.float64,
    "q_MLE": np.float64,
    "expert_LE": np.int64,
    "score_LE": np.float64,
    "error_LE": np.float64,
    "low_LE": np.float64,
    "high_LE": np.float64,
    "supported_LE": np.bool_,
}


def jackknife_error(replicates: Array) -> Array:
    """Standard error from the leave-one-group-out values [G, ...]: sqrt((G - 1) / G x sum of squared deviations from their
    mean).

    NaN with fewer than two groups, and where a replicate is undefined (an expert seen in one group only).
    """
    num_groups = len(replicates)
    if num_groups < 2:
        return np.full(replicates.shape[1:], np.nan)
    deviations = replicates - replicates.mean(axis=0)
    return np.asarray(np.sqrt((num_groups - 1) / num_groups * (deviations**2).sum(axis=0)))


def interval(value: Array, error: Array, num_groups: int, level: float = 0.95) -> tuple[Array, Array]:
    """Two-sided interval from Student's t with G - 1 degrees of freedom."""
    reach = error * stats.t.ppf(0.5 + level / 2, max(num_groups - 1, 1))
    return value - reach, value + reach


def upper_tail(joint_MLE: Array, expert_LE: Array, marker_M: Array, total: int) -> Array:
    """P(joint this large or larger) if the marker's tokens were drawn at random from all tokens: hypergeometric, [M, L, E].

    NaN where expert or marker was never seen. Tokens of one text are not independent, so small values are optimistic: use
    them for screening, not as proof.
    """
    p_MLE = stats.hypergeom.sf(joint_MLE - 1, total, expert_LE[None], marker_M[:, None, None])
    seen = (expert_LE[None] > 0) & (marker_M > 0)[:, None, None]
    return np.where(seen, np.clip(p_MLE, 0.0, 1.0), np.nan)


def false_discovery_rate(p: Array) -> Array:
    """Benjamini-Hochberg q over all defined cells; NaN stays NaN."""
    defined = np.isfinite(p)
    q = np.full(p.shape, np.nan)
    if defined.any():
        q[defined] = stats.false_discovery_control(p[defined])
    return q


def rank_agreement(first: Array, second: Array) -> float:
    """Spearman correlation of two score tables over the cells that both define; NaN with fewer than three or without spread."""
    both = np.isfinite(first) & np.isfinite(second)
    a, b = first[both], second[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def top_overlap(first: Array, second: Array, size: int) -> float:
    """Share of the ``size`` best cells of one table among those of the other; NaN when a table has fewer."""
    tops = [_top(table, size) for table in (first, second)]
    return len(tops[0] & tops[1]) / size if all(len(top) == size for top in tops) else float("nan")


def _top(table: Array, size: int) -> set[Sequence[int]]:
    cells = np.argwhere(np.isfinite(table))
    order = sorted(map(tuple, cells.tolist()), key=lambda cell: (-table[cell], cell))
    return set(order[:size])


_TYPES = {
    "model": dict,
    "marker_names": list[str],
    "coefficients": list[float],
    "num_traces": int,
    "num_tokens": int,
    "occurrences": list[int],
    "counts_digest": str,
    "options": dict,
    "halves": list,
    "stability": dict,
    "tables": dict,
}


class Halves(NamedTuple):
    """Combined score [L, E] from every other group of traces, and from the rest."""

    first_LE: Array
    second_LE: Array


class RankedExpert(NamedTuple):
    """One row of the ranking. ``layer`` is absolute; ``support`` counts selections at the markers of positive coefficient."""

    layer: int
    expert: int
    score: float
    low: float
    high: float
    support: int
    rate: float
    """Share of base tokens that selected the expert."""
    npmi: tuple[float, ...]
    """One value per marker."""
    q: float
    """False discovery rate of its association with a marker of positive coefficient (the smallest of them)."""
    supported: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertScores:
    """The result of `score_experts`. Tables run over markers M, layers with experts L (``model["moe_layers"]``) and experts E."""

    model: Mapping[str, Any]
    marker_names: tuple[str, ...]
    coefficients: tuple[float, ...]
    num_traces: int
    num_tokens: int
    occurrences: tuple[int, ...]
    """Coefficient of each marker."""
    counts_digest: str
    options: Mapping[str, Any]
    npmi_MLE: Array
    joint_MLE: Array
    p_MLE: Array
    """Probability of a joint count this large without association."""
    q_MLE: Array
    """Benjamini-Hochberg over all cells."""
    expert_LE: Array
    """Base tokens that selected the expert."""
    score_LE: Array
    error_LE: Array
    """Jackknife standard error of the score."""
    low_LE: Array
    high_LE: Array
    """95% interval."""
    supported_LE: Array
    halves: Halves

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute layer indices along L."""
        return tuple(self.model["moe_layers"])

    @property
    def rate_LE(self) -> Array:
        """Share of base tokens that selected the expert."""
        return self.expert_LE / max(self.num_tokens, 1)

    @property
    def support_LE(self) -> Array:
        """Selections at the markers of positive coefficient."""
        return np.asarray(self.joint_MLE[np.array(self.coefficients) > 0].sum(axis=0))

    @property
    def stability(self) -> dict[str, float]:
        """Agreement of two halves of the traces over supported experts: Spearman, and shares of the best 2, 5, 10 in common."""
        first, second = (np.where(self.supported_LE, half, np.nan) for half in self.halves)
        overlaps = {f"top{size}_overlap": top_overlap(first, second, size) for size in (2, 5, 10)}
        return {"spearman": rank_agreement(first, second), **overlaps}

    def ranking(self, *, supported_only: bool = True) -> list[RankedExpert]:
        """Experts by score, then support, then layer, then expert id; without those that have no defined score."""
        rows = []
        positive = np.array(self.coefficients) > 0
        support_LE, rate_LE = self.support_LE, self.rate_LE
        chosen = np.isfinite(self.score_LE) & (self.supported_LE | (not supported_only))
        for at in map(tuple, np.argwhere(chosen).tolist()):
            q_M = self.q_MLE[:, at[0], at[1]][positive]
            rows.append(
                RankedExpert(
                    layer=self.layers[at[0]],
                    expert=at[1],
                    score=float(self.score_LE[at]),
                    low=float(self.low_LE[at]),
                    high=float(self.high_LE[at]),
                    support=int(support_LE[at]),
                    rate=float(rate_LE[at]),
                    npmi=tuple(self.npmi_MLE[:, at[0], at[1]].tolist()),
                    q=float(np.nanmin(q_M)) if np.isfinite(q_M).any() else float("nan"),
                    supported=bool(self.supported_LE[at]),
                )
            )
        return sorted(rows, key=lambda row: (-row.score, -row.support, row.layer, row.expert))

    def table(self, top: int = 10) -> str:
        """The best experts as text for a terminal."""
        head = ["rank", "layer", "expert", "score", "95% interval", "support", "rate", "q", *self.marker_names]
        lines = [head]
        for rank, row in enumerate(self.ranking()[:top], start=1):
            reach = f"{row.low:+.3f} {row.high:+.3f}" if np.isfinite(row.low) else "-"
            cells = [
                rank,
                row.layer,
                row.expert,
                f"{row.score:.3f}",
                reach,
                row.support,
                f"{row.rate:.4f}",
                f"{row.q:.1e}",
            ]
            lines.append([*map(str, cells), *(f"{value:+.3f}" for value in row.npmi)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON (undefined numbers as null); the file appears complete or not at all."""
        record = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in _TABLES}
        record |= {
            "version": _VERSION,
            "halves": [_listed(half) for half in self.halves],
            "stability": {key: None if np.isnan(value) else value for key, value in self.stability.items()},
            "tables": {name: _listed(getattr(self, name)) for name in _TABLES},
        }
        write_whole(path, json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertScores:
        """Read what ``save`` wrote; ValueError in one line for anything else."""
        name = os.fspath(path)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"the scores {name!r} cannot be read: {error.strerror or error}") from error
        record = parse_json(content, f"{name} holds no expert scores: it", "make them with 'moe-steer score'")
        try:
            check_types(record, "", _TYPES)
            if record.pop("version") != _VERSION:
                raise ValueError(f"this program reads version {_VERSION}")
            del record["stability"]  # computed from the tables
            tables = record.pop("tables")
            arrays: dict[str, Any] = {key: _table(tables[key], dtype) for key, dtype in _TABLES.items()}
            record["halves"] = Halves(*(_table(half, np.float64) for half in record["halves"]))
            check_types(record["model"], "model", {"num_experts": int, "moe_layers": list[int]})
            record |= {key: tuple(record[key]) for key in ("marker_names", "coefficients", "occurrences")}
            scores = cls(**record, **arrays)
            scores._check_shapes()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            said = short(repr(error))
            raise ValueError(f"{name} holds no expert scores ({said}): make them with 'moe-steer score'") from error
        return scores

    def _check_shapes(self) -> None:
        sizes = {"M": len(self.marker_names), "L": len(self.layers), "E": self.model["num_experts"]}
        for key in _TABLES:
            wanted = tuple(sizes[letter] for letter in key.rpartition("_")[2])
            if getattr(self, key).shape != wanted:
                raise ValueError(f"{key} has the shape {getattr(self, key).shape}, not {wanted}")
        lengths = {len(self.coefficients), len(self.occurrences), sizes["M"]}
        if len(lengths) > 1 or any(half.shape != self.score_LE.shape for half in self.halves):
            raise ValueError(f"its halves, coefficients or occurrences are not those of {sizes['M']} markers")


def _table(values: Any, dtype: Any) -> Array:
    """Nested lists as an array; ValueError for texts and other values that numpy would take for numbers."""
    known: dict[Any, set[type]] = {np.float64: {float, int, NoneType}, np.int64: {int}, np.bool_: {bool}}
    found = np.array(values, dtype=object)
    if odd := set(map(type, found.ravel().tolist())) - known[dtype]:
        raise ValueError(f"a table holds a value of the type {min(kind.__name__ for kind in odd)}")
    return found.astype(dtype)


def _listed(array: Array) -> list[Any]:
    if array.dtype.kind != "f":
        return list(array.tolist())
    plain = array.astype(object)
    plain[~np.isfinite(array)] = None
    return list(plain.tolist())
