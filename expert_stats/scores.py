"""Scores of all experts with their evidence: the record, its ranking, its table, its file (JSON)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expert_stats.evidence import EVERY, Fresh, Halves, fresh_record, read_fresh
from expert_stats.evidence.json_tables import listed, read_table
from expert_stats.evidence.reliability import TOPS
from moe_steer.console import aligned
from moe_steer.files import write_whole
from moe_steer.json_files import check_types, parse_json, short

Array = np.ndarray[Any, Any]

_VERSION = 4
_TABLES = {
    "npmi_MLE": np.float64,
    "joint_MLE": np.int64,
    "p_MLE": np.float64,
    "q_MLE": np.float64,
    "q_LE": np.float64,
    "rank_MLE": np.int64,
    "expert_LE": np.int64,
    "score_LE": np.float64,
    "error_LE": np.float64,
    "low_LE": np.float64,
    "high_LE": np.float64,
    "bound_LE": np.float64,
    "chance_TLE": np.float64,
    "without_score_LE": np.float64,
    "without_p_LE": np.float64,
    "supported_LE": np.bool_,
}
_TYPES = {
    "model": dict,
    "marker_names": list[str],
    "coefficients": list[float],
    "num_traces": int,
    "num_problems": int,
    "num_tokens": int,
    "occurrences": list[int],
    "counts_digest": str,
    "options": dict,
    "method": dict,
    "tests": list[str],
    "cannot_answer": str,
    "tokens": dict,
    "families": dict,
    "halves": list,
    "fresh": list[dict],
    "stability": dict,
    "tables": dict,
}
_METHOD = {"words": str, "claim": str, "signed": bool, "problems": int}


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
    """Its evidence; NaN without any."""
    supported: bool
    bound: float
    """Lower end that holds for all candidates together, so also for the best."""
    chance: float
    """Share of bootstrap samples of problems in which it is among the best two."""
    token_rank: int
    """Of the marker among the reference tokens, by nPMI at this expert (the best of the positive markers); 0: not compared."""
    without_score: float
    """The lowest score without one family of problems; NaN with fewer than two."""
    without_p: float
    """The largest p of the robust test without one family of problems."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertScores:
    """The result of `score_experts`. Tables run over markers M, layers with experts L (``model["moe_layers"]``) and experts E."""

    model: Mapping[str, Any]
    marker_names: tuple[str, ...]
    coefficients: tuple[float, ...]
    num_traces: int
    num_problems: int
    """0 where the counts keep groups of traces (files of version 1)."""
    num_tokens: int
    occurrences: tuple[int, ...]
    """Of each marker."""
    counts_digest: str
    options: Mapping[str, Any]
    method: Mapping[str, Any]
    """Of a rival of nPMI: the score in ``words``, the ``claim`` that q is evidence of, two sides or one (``signed``), ``problems``."""
    tests: tuple[str, ...]
    """What q rests on at each marker: "robust" (over problems, within position bins), "tokens" (among other tokens), "" (none)."""
    cannot_answer: str
    """What the counts do not tell, in a line; "" for counts by trace."""
    tokens: Mapping[str, Any]
    """Where the markers stand among reference tokens: ``compared``, and by marker ``rank`` and ``top`` (the closest expert's
    nPMI); ``references`` as [id, text, occurrences, top], the closest first."""
    families: Mapping[str, Any]
    """Agreement of families of problems: matrices ``overlap`` and ``spearman`` of [value, low, high] over ``families``."""
    npmi_MLE: Array
    """RICE's Eq. 5, unshrunk."""
    joint_MLE: Array
    p_MLE: Array
    """One-sided, at markers of positive coefficient; NaN elsewhere."""
    q_MLE: Array
    q_LE: Array
    """The evidence: the smallest q at the markers of positive coefficient, or that of the rival's own test; NaN without any."""
    rank_MLE: Array
    """Of the marker among the reference tokens at each expert, from 1; 0 where not compared."""
    expert_LE: Array
    """Base tokens that selected the expert."""
    score_LE: Array
    error_LE: Array
    """Standard error of the score, by the influence of problems."""
    low_LE: Array
    high_LE: Array
    """95% interval of an expert named beforehand."""
    bound_LE: Array
    """95% lower bounds that hold together, so for whichever is chosen."""
    chance_TLE: Array
    """Share of bootstrap samples in which the expert is among the best 1, 2, 5, 10."""
    without_score_LE: Array
    without_p_LE: Array
    """The worst that leaving one family of problems out does to score and p."""
    supported_LE: Array
    halves: Halves
    fresh: tuple[Fresh, ...]
    """What was chosen, measured in problems that did not choose it: all supported experts where other counts were given to measure
    in, else the best of each half of the problems, in the other half."""

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
        """Agreement of two halves of the problems (`Halves.stability`)."""
        return self.halves.stability

    @property
    def elsewhere(self) -> dict[tuple[int, int], Fresh]:
        """(layer, expert) -> its measurement in other counts; empty without them."""
        return {(one.layer, one.expert): one for one in self.fresh if one.chosen_by == EVERY}

    def ranking(self, *, supported_only: bool = True) -> list[RankedExpert]:
        """Experts by score, then support, then layer, then expert id; without those that have no defined score."""
        rows = []
        positive = np.array(self.coefficients) > 0
        support_LE, rate_LE, q_LE = self.support_LE, self.rate_LE, self.q_LE
        chosen = np.isfinite(self.score_LE) & (self.supported_LE | (not supported_only))
        for at in map(tuple, np.argwhere(chosen).tolist()):
            ranks = [int(rank) for rank in self.rank_MLE[:, at[0], at[1]][positive] if rank]
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
                    q=float(q_LE[at]),
                    supported=bool(self.supported_LE[at]),
                    bound=float(self.bound_LE[at]),
                    chance=float(self.chance_TLE[TOPS.index(2)][at]),
                    token_rank=min(ranks, default=0),
                    without_score=float(self.without_score_LE[at]),
                    without_p=float(self.without_p_LE[at]),
                )
            )
        return sorted(rows, key=lambda row: (-row.score, -row.support, row.layer, row.expert))

    def table(self, top: int = 10) -> str:
        """The best experts as text for a terminal."""
        elsewhere = self.elsewhere
        head = ["rank", "layer", "expert", "score", *["fresh interval"] * bool(elsewhere), "bound", "top 2", "support"]
        head += ["rate", "q", "token", *self.marker_names]
        lines = [head]
        for rank, row in enumerate(self.ranking()[:top], start=1):
            reach = [reach_of(elsewhere[row.layer, row.expert], "")] if elsewhere else []
            cells = [
                rank,
                row.layer,
                row.expert,
                f"{row.score:.3f}",
                *reach,
                _shown(row.bound, "+.3f"),
                _shown(row.chance, ".0%"),
                row.support,
                f"{row.rate:.4f}",
                _shown(row.q, ".1e"),
                row.token_rank or "-",
            ]
            lines.append([*map(str, cells), *(f"{value:+.3f}" for value in row.npmi)])
        return "\n".join(aligned(lines))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON (undefined numbers as null); the file appears complete or not at all."""
        record = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in _TABLES}
        record |= {
            "version": _VERSION,
            "halves": [listed(half) for half in self.halves],
            "fresh": fresh_record(self.fresh),
            "stability": {key: None if np.isnan(value) else value for key, value in self.stability.items()},
            "tables": {name: listed(getattr(self, name)) for name in _TABLES},
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
            if (version := record.pop("version")) not in (3, _VERSION):
                raise ValueError(f"this program reads versions 3 and {_VERSION}")
            if version == 3:  # it measured nothing in problems that did not choose
                record["fresh"] = []
            del record["stability"]  # computed from the tables
            tables = record.pop("tables")
            arrays: dict[str, Any] = {key: read_table(tables[key], dtype) for key, dtype in _TABLES.items()}
            kinds = (np.float64, np.float64, np.bool_, np.bool_)
            record["halves"] = Halves(
                *(read_table(half, kind) for half, kind in zip(record["halves"], kinds, strict=True))
            )
            record["fresh"] = read_fresh(record["fresh"])
            check_types(record["model"], "model", {"num_experts": int, "moe_layers": list[int]})
            check_types(record["options"], "options", {"by": str})
            check_types(record["method"], "method", _METHOD)
            if set(record["method"]) != set(_METHOD) or "by" not in record["options"]:
                raise ValueError("no method")
            record |= {key: tuple(record[key]) for key in ("marker_names", "coefficients", "occurrences", "tests")}
            scores = cls(**record, **arrays)
            scores._check_shapes()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            said = short(repr(error))
            raise ValueError(f"{name} holds no expert scores ({said}): make them with 'moe-steer score'") from error
        return scores

    def _check_shapes(self) -> None:
        sizes = {"M": len(self.marker_names), "L": len(self.layers), "E": self.model["num_experts"], "T": len(TOPS)}
        if not all(sizes.values()):
            raise ValueError("its tables are empty")
        for key in _TABLES:
            wanted = tuple(sizes[letter] for letter in key.rpartition("_")[2])
            if getattr(self, key).shape != wanted:
                raise ValueError(f"{key} has the shape {getattr(self, key).shape}, not {wanted}")
        lengths = {len(self.coefficients), len(self.occurrences), sizes["M"]}
        if len(lengths) > 1 or any(half.shape != self.score_LE.shape for half in self.halves):
            raise ValueError(f"its halves, coefficients or occurrences are not those of {sizes['M']} markers")


def reach_of(one: Fresh, between: str = " to") -> str:
    """The ends of a fresh interval, in words where there is none."""
    return f"{one.low:+.2f}{between} {one.high:+.2f}" if np.isfinite(one.low) else "-"


def _shown(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"
