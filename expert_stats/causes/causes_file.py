"""``Causes``: derivatives of an outcome for every expert, and exact effects of the best. One JSON file of kind "causes"."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from expert_stats.causes.over_problems import Agreement, agreement, interval, mean_and_error, t_test
from expert_stats.evidence.json_tables import listed
from expert_stats.evidence.sums import false_discovery_rate
from expert_stats.scores import ExpertScores
from moe_steer.files import write_whole
from moe_steer.json_files import check_types, quoted, read_json, record_of
from moe_steer.plan import ExpertGain, SteeringPlan

Array = np.ndarray[Any, Any]
KIND, _VERSION = "causes", 1
INERT_SHARE = 0.01
"""An expert is inert when its interval stays within this share of the largest derivative in the table, on both sides of 0."""
_REMEDY = "make it with 'moe-steer causes'"
_TYPES: dict[str, Any] = {
    "kind": str, "version": int, "model": dict, "outcome": dict, "wanted": str, "problems": list[str],
    "value": list[float], "gradient": str, "selected": list[list[int]], "effects": list[dict], "coalition": list[dict], "tested_on": list[str],
    "tables": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExactEffect:
    """The outcome under a gain on one or several experts minus the outcome without, over ``tested_on`` problems."""

    experts: tuple[tuple[int, int], ...]
    """(layer, expert), ..."""
    gains: tuple[float, ...]
    router: str
    effect: float
    low: float
    high: float
    p: float
    q: float
    """Benjamini-Hochberg over all effects of its list."""
    by_problem: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RankedCause:
    """One expert: derivative with its interval, false discovery rate, and what that says in a word."""

    layer: int
    expert: int
    gradient: float
    low: float
    high: float
    q: float
    selected: int
    verdict: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Causes:
    """Derivatives d outcome / d log gain, by problem P, layer with experts L (``model["moe_layers"]``) and expert E.

    ``outcome``: what was read, in words and options. ``wanted``: "higher" or "lower", what a plan is to make of it. ``value_P``: the
    outcome without steering. ``selected_LE``: tokens that selected the expert. ``effects``: single experts under gains;
    ``coalition``: the greedy sequence, each step with one expert more. ``tested_on``: the problems that the exact effects are
    measured on; the others chose the experts.
    """

    model: Mapping[str, Any]
    outcome: Mapping[str, Any]
    wanted: str
    problems: tuple[str, ...]
    value_P: Array
    gradient_PLE: Array
    selected_LE: Array
    effects: tuple[ExactEffect, ...] = ()
    coalition: tuple[ExactEffect, ...] = ()
    tested_on: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute layer indices along L."""
        return tuple(self.model["moe_layers"])

    def tables(self, rows: Array | None = None) -> dict[str, Array]:
        """gradient, error, low, high, p and q of the mean over problems (``rows``: over these alone), each [L, E].

        p and q are NaN of experts that no token selected; q is Benjamini-Hochberg's over all others.
        """
        gradient_PLE = self.gradient_PLE if rows is None else self.gradient_PLE[rows]
        gradient_LE, error_LE = mean_and_error(gradient_PLE)
        low_LE, high_LE = interval(gradient_LE, error_LE, len(gradient_PLE))
        p_LE = np.where(self.selected_LE > 0, t_test(gradient_LE, error_LE, len(gradient_PLE)), np.nan)
        q_LE = false_discovery_rate(p_LE)
        names = ("gradient_LE", "error_LE", "low_LE", "high_LE", "p_LE", "q_LE")
        return dict(zip(names, (gradient_LE, error_LE, low_LE, high_LE, p_LE, q_LE), strict=True))

    def ranking(self, *, max_q: float = 0.05, rows: Array | None = None) -> list[RankedCause]:
        """Experts that a token selected, from what raises the outcome most surely (by the lower end of the interval) to what
        lowers it most surely; those without evidence between them."""
        tables = self.tables(rows)
        largest = float(np.abs(tables["gradient_LE"]).max())
        found = []
        for at in map(tuple, np.argwhere(self.selected_LE > 0).tolist()):
            gradient, low, high, q = (float(tables[name][at]) for name in ("gradient_LE", "low_LE", "high_LE", "q_LE"))
            found.append(
                RankedCause(
                    layer=self.layers[at[0]],
                    expert=at[1],
                    gradient=gradient,
                    low=low,
                    high=high,
                    q=q,
                    selected=int(self.selected_LE[at]),
                    verdict=_verdict(gradient, low, high, q, max_q, largest),
                )
            )
        return sorted(found, key=lambda row: (-_surely(row), -row.gradient, row.layer, row.expert))

    def of_the_best(self, row: RankedCause) -> tuple[float, float]:
        """Interval of an expert that was picked as the best: it holds for all that a token selected at once (Bonferroni's t). An
        expert's own interval covers the best of 64 to 512 in 24% to 87% of simulated runs of 10 to 100 problems."""
        spare, num = max(len(self.problems) - 1, 1), int((self.selected_LE > 0).sum())
        wider = float(scipy.stats.t.isf(0.025 / num, spare) / scipy.stats.t.isf(0.025, spare))
        return row.gradient - wider * (row.gradient - row.low), row.gradient + wider * (row.high - row.gradient)

    def agreement(self, scores: ExpertScores, **options: Any) -> Agreement:
        """Rank correlation with another score over the experts that it supports and that a token selected here.
        ValueError for scores of another model."""
        refuse_other_model("scores", scores.model, "causes", self.model)
        used_LE = scores.supported_LE & (self.selected_LE > 0)
        return agreement(self.gradient_PLE, scores.score_LE, used_LE, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; the file appears complete or not at all. The derivatives by problem are float32 in base64, little-endian;
        the tables of ``tables`` are there for readers, and computed again on reading."""
        content = {
            "kind": KIND,
            "version": _VERSION,
            **{key: getattr(self, key) for key in ("model", "outcome", "wanted", "problems", "tested_on")},
            "value": self.value_P.tolist(),
            "gradient": base64.b64encode(self.gradient_PLE.astype("<f4").tobytes()).decode(),
            "selected": self.selected_LE.tolist(),
            "tables": {name: listed(table) for name, table in self.tables().items()},
            "effects": [dataclasses.asdict(one) for one in self.effects],
            "coalition": [dataclasses.asdict(one) for one in self.coalition],
        }
        write_whole(path, json.dumps(content, allow_nan=False, separators=(",", ":"), default=_plain) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Causes:
        """Read what ``save`` wrote; ValueError in one line for anything else."""
        name = os.fspath(path)
        data = read_json(path, _REMEDY, _TYPES, f"there are no causes at {name!r}: {_REMEDY}")
        try:
            if data["kind"] != KIND or data["version"] != _VERSION:
                raise ValueError(f"this program reads kind {KIND!r}, version {_VERSION}")
            if unknown := set(data) - set(_TYPES):
                raise ValueError(f"unknown key {quoted(min(unknown))}")
            check_types(data["model"], "model", {"num_experts": int, "num_layers": int, "moe_layers": list[int]})
            shape = (len(data["problems"]), len(data["model"]["moe_layers"]), data["model"]["num_experts"])
            flat = np.frombuffer(base64.b64decode(data["gradient"], validate=True), dtype="<f4")
            selected_LE = np.array(data["selected"], dtype=np.int64).reshape(shape[1:])
            if (selected_LE < 0).any() or not np.isfinite(flat).all() or data["wanted"] not in ("higher", "lower"):
                raise ValueError(
                    "counts below 0, derivatives that are no numbers, or wanted is neither higher nor lower"
                )
            return cls(
                **{key: data[key] for key in ("model", "outcome", "wanted")},
                problems=tuple(data["problems"]),
                tested_on=tuple(data["tested_on"]),
                value_P=np.array(data["value"], dtype=np.float64).reshape(shape[0]),
                gradient_PLE=flat.astype(np.float64).reshape(shape),
                selected_LE=selected_LE,
                effects=tuple(record_of(ExactEffect, one, "an effect") for one in data["effects"]),
                coalition=tuple(record_of(ExactEffect, one, "an effect") for one in data["coalition"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{name} holds no causes ({error!r}): {_REMEDY}") from error


def is_causes(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it holds causes; what else it is, its own reader says."""
    try:
        with open(path, "rb") as file:
            return re.match(rb'\s*{\s*"kind"\s*:\s*"causes"', file.read(64)) is not None
    except OSError:
        return True


def refuse_other_model(noun: str, model: Mapping[str, Any], other_noun: str, other: Mapping[str, Any]) -> None:
    """ValueError where two files are of models with other experts."""
    for key in ("model_type", "num_layers", "num_experts", "moe_layers"):
        if list(np.atleast_1d(model[key])) != list(np.atleast_1d(other[key])):
            raise ValueError(
                f"the {noun} are of a model with {key} {model[key]!r}, the {other_noun} of one with {other[key]!r}: "
                f"give {noun} of the same model"
            )


def select_causes(
    causes: Causes,
    top: int = 2,
    gain: float = 64.0,
    *,
    max_q: float = 0.05,
    scope: str = "all",
    renormalize: bool = False,
) -> SteeringPlan:
    """A plan that moves the outcome where it is wanted: experts that raise it are turned up (gain > 1) or experts that lower it
    are turned down (gain < 1); of an outcome that is wanted lower the other way round. ValueError when fewer than ``top``
    experts are shown to (q <= ``max_q``)."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {top!r}: give a whole number >= 1")
    if gain == 1:
        raise ValueError("gain is 1, which changes nothing: give another")
    sign = 1 if (gain > 1) == (causes.wanted == "higher") else -1
    rows = [row for row in causes.ranking(max_q=max_q)[::sign] if row.verdict == ("raises" if sign > 0 else "lowers")]
    if len(rows) < top:
        word = "raise" if sign > 0 else "lower"
        raise ValueError(
            f"top is {top}, but only {len(rows)} experts are shown to {word} the outcome (q <= {max_q:g}, {len(causes.problems)} "
            "problems): run the causes over more problems, or ask for fewer"
        )
    return SteeringPlan(
        experts=[ExpertGain(row.layer, row.expert, gain) for row in rows[:top]],
        scope=scope,
        renormalize=renormalize,
        model={key: causes.model[key] for key in ("model_type", "num_layers", "num_experts", "name")},
        provenance={
            "made_by": "expert_stats.select_causes",
            "method": "derivative of an outcome with respect to log gains",
            "outcome": dict(causes.outcome),
            "wanted": causes.wanted,
            "num_problems": len(causes.problems),
            "max_q": max_q,
            "experts": [dataclasses.asdict(row) for row in rows[:top]],
        },
    )


def _verdict(gradient: float, low: float, high: float, q: float, max_q: float, largest: float) -> str:
    if q <= max_q:
        return "raises" if gradient > 0 else "lowers"
    margin = INERT_SHARE * largest
    return "inert" if -margin <= low and high <= margin else "not shown"


def _surely(row: RankedCause) -> float:
    """The end of the interval nearer to 0, with its sign; 0 where the interval holds 0."""
    return max(row.low, 0.0) + min(row.high, 0.0) if np.isfinite(row.low) else 0.0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value)
