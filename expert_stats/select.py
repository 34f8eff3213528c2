"""From scores to a steering plan: the best experts, and a placebo of random experts that fire equally often."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from expert_stats.counts import RoutingCounts
from expert_stats.scores import ExpertScores, RankedExpert
from expert_stats.wording import without_evidence
from moe_steer.plan import ExpertGain, SteeringPlan

Array = np.ndarray[Any, Any]

MAX_Q = 0.05
"""Evidence that a plan asks for."""


class Unproven(ValueError):
    """Experts score well enough, and there is no evidence that they answer to the thought."""


def select_experts(
    scores: ExpertScores,
    top: int = 2,
    gain: float = 64.0,
    *,
    min_support: int | None = None,
    min_score: float | None = 0.0,
    max_q: float | None = MAX_Q,
    scope: str = "all",
    renormalize: bool = False,
) -> SteeringPlan:
    """A plan that multiplies the gate weight of the ``top`` best experts by ``gain`` (RICE: 2 experts, gain 64; 0 suppresses).

    Experts qualify when they are supported (`score_experts`), have evidence (q at most ``max_q``; None asks for none, and the
    provenance calls the plan unproven where its experts lack it), at least ``min_support`` joint selections where it is
    given (of scores at markers), and score more than ``min_score`` (None: any score). Ties go to the larger support, then the
    lower layer, then the lower expert id. Of a measure with two sides (`ExpertScores.method`) a gain below 1 takes the other end:
    the lowest, which must score less than minus ``min_score``. Exactly ``top`` experts are returned; ValueError says how many qualify when there are fewer.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {top!r}: give a whole number >= 1")
    side = -1.0 if scores.method["signed"] and gain < 1 else 1.0
    least = 0 if scores.method["claim"] else min_support or 0
    rows = [
        row for row in scores.ranking() if row.support >= least and (min_score is None or side * row.score > min_score)
    ][:: int(side)]
    proven = [row for row in rows if max_q is None or row.q <= max_q]
    if len(rows) < top:
        supported = int(scores.supported_LE.sum())
        raise ValueError(
            f"top is {top}, but only {len(rows)} experts qualify ({supported} supported of {scores.supported_LE.size}; "
            f"min_support {min_support}, min_score {min_score}): count more traces, ask for fewer, or lower the thresholds"
        )
    if len(proven) < top:
        raise Unproven(
            f"top is {top}, but only {len(proven)} experts have evidence (q at most {max_q}; {without_evidence(scores)}): "
            "count more problems, ask for fewer, or go on with the best and call them unproven (--unproven; max_q=None)"
        )
    rows = proven
    chosen = rows[:top]
    return SteeringPlan(
        experts=[ExpertGain(row.layer, row.expert, gain) for row in chosen],
        scope=scope,
        renormalize=renormalize,
        model=_plan_model(scores.model),
        provenance={
            "made_by": "expert_stats.select_experts",
            "method": scores.method["words"] or "RICE (arXiv 2505.14681): sum over markers of coefficient x nPMI",
            "evidence": "shown" if all(row.q <= (MAX_Q if max_q is None else max_q) for row in chosen) else "unproven",
            "claim": scores.method["claim"],
            "coefficients": dict(zip(scores.marker_names, scores.coefficients, strict=True)),
            "occurrences": dict(zip(scores.marker_names, scores.occurrences, strict=True)),
            "counts_sha256": scores.counts_digest,
            "num_traces": scores.num_traces,
            "num_tokens": scores.num_tokens,
            "options": {
                **scores.options,
                "select_min_support": min_support,
                "select_min_score": min_score,
                "select_max_q": max_q,
            },
            "stability": {key: _finite(value) for key, value in scores.stability.items()},
            "experts": [_row(row) for row in chosen],
        },
    )


def select_placebo(
    source: ExpertScores | RoutingCounts, plan: SteeringPlan, seed: int = 0, *, num_candidates: int = 4
) -> SteeringPlan:
    """The plan with every expert replaced by a random other expert of the same layer that fires about as often.

    Candidates are experts that the plan does not name and that were selected at least once; one is drawn among the
    ``num_candidates`` whose firing rate is nearest by ratio. Given scores, experts that would qualify for a plan themselves
    (supported, score > 0) stay out while a layer has others: a placebo should lack what is tested. What is done to an
    expert (gain, force, bias on its logit), top_k, scope and renormalisation stay. The draw depends on ``seed`` and on the expert only. ValueError when a layer has no candidate, or
    the plan is of another model.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}: give a whole number >= 1")
    if not plan.experts:
        raise ValueError("the plan names no experts: there is nothing to match a placebo with")
    model, fired_LE, num_tokens, digest = _firing(source)
    _check_fits(plan, model)
    active_LE = _active(source, fired_LE, plan)
    taken = {(entry.layer, entry.expert) for entry in plan.experts}
    placebo, matches = [], []
    for entry in plan.experts:
        row = model["moe_layers"].index(entry.layer)
        fired_E, active_E = fired_LE[row], active_LE[row]
        free = [e for e in range(len(fired_E)) if fired_E[e] > 0 and (entry.layer, e) not in taken]
        free = [e for e in free if not active_E[e]] or free
        if not free:
            raise ValueError(
                f"layer {entry.layer} has no expert left that fires and that the plan does not name: "
                "a placebo for it needs another plan or more traces"
            )
        wanted = int(fired_E[entry.expert])
        nearest = sorted(free, key=lambda e: (_distance(int(fired_E[e]), wanted), e))[:num_candidates]
        expert = nearest[_draw(f"{seed}:{entry.layer}:{entry.expert}", len(nearest))]
        taken.add((entry.layer, expert))
        placebo.append(dataclasses.replace(entry, expert=expert))
        matches.append(
            {
                "layer": entry.layer,
                "expert": expert,
                "instead_of": entry.expert,
                "rate": int(fired_E[expert]) / num_tokens,
                "rate_of_planned": wanted / num_tokens,
                "qualifies_itself": bool(active_E[expert]),
                "candidates": nearest,
            }
        )
    return SteeringPlan(
        experts=placebo,
        top_k=plan.top_k,
        scope=plan.scope,
        renormalize=plan.renormalize,
        model=_plan_model(model),
        provenance={
            "made_by": "expert_stats.select_placebo",
            "method": "random experts of the same layers and about the same firing rate",
            "seed": seed,
            "num_candidates": num_candidates,
            "counts_sha256": digest,
            "placebo_of": plan.digest(),
            "experts": matches,
        },
    )


def _firing(source: ExpertScores | RoutingCounts) -> tuple[Mapping[str, Any], Array, int, str]:
    if isinstance(source, RoutingCounts):
        return source.signature.model, source.grouped()["expert_GLE"].sum(0), source.num_tokens, source.digest()
    return source.model, source.expert_LE, source.num_tokens, source.counts_digest


def _active(source: ExpertScores | RoutingCounts, fired_LE: Array, plan: SteeringPlan) -> Array:
    """Experts that would qualify for a plan themselves, of a measure with two sides on the side of the plan's gains; empty without scores."""
    if isinstance(source, RoutingCounts):
        return np.zeros(fired_LE.shape, dtype=np.bool_)
    side = -1.0 if source.method["signed"] and all(entry.gain < 1 for entry in plan.experts) else 1.0
    return np.asarray(source.supported_LE & (side * np.nan_to_num(source.score_LE) > 0))


def _check_fits(plan: SteeringPlan, model: Mapping[str, Any]) -> None:
    from moe_steer.layers import ModelShape

    plan.check(ModelShape.from_dict(dict(model)))


def _distance(fired: int, wanted: int) -> float:
    """Distance of two firing counts by ratio; 1 is added to both so that an expert that never fired has a distance too."""
    return abs(math.log((fired + 1) / (wanted + 1)))


def _draw(key: str, size: int) -> int:
    """A number below ``size`` that depends only on the key, on every platform and in every version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % size


def _plan_model(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("model_type", "num_layers", "num_experts", "name")}


def _row(row: RankedExpert) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "expert": row.expert,
        "score": row.score,
        "low": _finite(row.low),
        "high": _finite(row.high),
        "support": row.support,
        "rate": row.rate,
        "q": _finite(row.q),
        "bound": _finite(row.bound),
        "top2_chance": _finite(row.chance),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
