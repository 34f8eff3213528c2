"""What a finished main job has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expert_stats import (
    DosePoint,
    ExpertScores,
    RoutingCounts,
    dose_response,
    evidence_sentence,
    family_matrix,
    fresh_lines,
    heat_map,
    interval_lines,
    rank_stability,
    score_experts,
)
from expert_stats.causes import Causes
from expert_stats.evidence import fresh_record
from expert_stats.rivals import Sources, rival_of
from launch.core.findings import Findings, arm_lines, silent_arms
from launch.core.wiring import parse_coefficients
from launch.jobs.experts_options import Options
from moe_steer import ExpertGain, SteeringPlan
from reasoning_evals import compare_arms
from reasoning_evals.comparing import Comparison, Tuning, rounded
from reasoning_evals.report import Table, minus
from reasoning_evals.runs import GradeRow, read_audit

COUNTS, CAUSES, FRESH_COUNTS = "counts.safetensors", "causes.json", "fresh_counts.safetensors"
_BEST = 10
_THEN = (
    "moe-steer inspect {folder}    where the experts fire, token by token",
    "moe-steer power --baseline {folder}/test    problems and samples that an effect needs",
)
_PLAY = "moe-steer playground {model} --plan {folder}/plan.json    see the embedded model think under the plan, in a browser"
NO_PLACEBO = (
    "the plan has directions alone, so there is no placebo arm: a placebo is random experts that fire as often as the plan's, "
    "and this plan names none; whether a random direction would do as much is not tested"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that the steps made."""

    options: Options
    plan: SteeringPlan
    placebo: SteeringPlan | None
    scores: ExpertScores | None
    tuning: Sequence[GradeRow]
    test: Sequence[GradeRow]
    folder: Path


def findings_of(outcome: Outcome) -> Findings:
    """The comparison of the arms, the sweep of gains, the scores, what fired."""
    plan, placebo, options = outcome.plan, outcome.placebo, outcome.options
    tuned = None
    if outcome.tuning:
        num = len({row.problem_id for row in outcome.tuning})
        tuned = Tuning(num_settings=len(options.gains), on=f"{num} tuning problems")
    comparison = compare_arms(outcome.test, tuned=tuned)
    sweep = compare_arms(outcome.tuning) if outcome.tuning else None
    plans = {"baseline": None, "steered": plan, **({"placebo": placebo} if placebo else {})}
    evidence = []
    if outcome.scores and not options.given:
        scores, pairs = outcome.scores, [(entry.layer, entry.expert) for entry in plan.experts]
        evidence = [evidence_of(plan, scores, options), *fresh_lines(scores, pairs), *interval_lines(scores)]
    chosen = _by_both(outcome) if options.by == "causes" else []
    silent = silent_arms(plans, "baseline", outcome.folder / "test")
    return Findings(
        folder=outcome.folder,
        step="test",
        title=f"Does the plan help {options.model}?"
        if plan.residual or plan.top_k
        else f"Do the experts that make {options.model} go on help?"
        if chosen
        else f"Do the thinking experts of {options.model} help?",
        comparison=comparison,
        sweep=sweep,
        results=_results(outcome, comparison, sweep, evidence) | ({"chosen": chosen} if chosen else {}),
        summary=[*arm_lines(comparison), *(pair.sentence for pair in comparison.pairs)],
        facts=_facts(outcome),
        warnings=[*silent, *([] if plan.experts else [NO_PLACEBO])],
        silent=silent,
        above=evidence,
        tables={"The experts, by the problems that chose them": _chosen_table(chosen)} if chosen else {},
        figures=_figures(outcome, sweep),
        then=[
            *(_THEN if outcome.scores else _THEN[1:]),
            *([_PLAY.replace("{model}", options.model)] if options.is_lab else []),
        ],
    )


def evidence_of(plan: SteeringPlan, scores: ExpertScores, options: Options) -> str:
    """The verdict on the plan's experts: evidence, or unproven and why."""
    return evidence_sentence(scores, [(entry.layer, entry.expert) for entry in plan.experts], options.max_q)


def scored(folder: Path, options: Options, by: str, measured_on: RoutingCounts | None = None) -> ExpertScores:
    """The scores of the counts that a run left, and for ``by`` causes of its causes. ``measured_on``: counts of problems that did not choose."""
    counts = RoutingCounts.load(folder / COUNTS)
    causes = Causes.load(folder / CAUSES) if by == "causes" else None
    return score_experts(
        counts,
        parse_coefficients(options.coefficients) or None,
        min_support=options.min_support,
        missing_marker=None if options.given else "skip",  # a given plan is tested on models without thoughts too
        rival=rival_of(by, counts, Sources(causes=causes)),
        measured_on=measured_on,
    )


def place_of(scores: ExpertScores, layer: int, expert: int) -> dict[str, Any]:
    """What scores say of an expert: ``score`` with its 95% interval, ``q``, and ``rank`` from 1 ``of`` those with support; None for what is undefined."""
    order = [(row.layer, row.expert) for row in scores.ranking()]
    at = scores.layers.index(layer), expert
    tables = {
        "score": scores.score_LE,
        "low": scores.low_LE,
        "high": scores.high_LE,
        "q": scores.q_LE,
        "rate": scores.rate_LE,
    }
    values = {name: float(table[at]) if np.isfinite(table[at]) else None for name, table in tables.items()}
    rank = order.index((layer, expert)) + 1 if (layer, expert) in order else None
    return rounded(values) | {"rank": rank, "of": len(order)}


def gain_name(gain: float) -> str:
    """The name of a tuning arm."""
    return f"gain {gain:g}"


def num_correct(rows: Sequence[GradeRow]) -> Mapping[str, int]:
    """Correct answers of each arm."""
    result: dict[str, int] = {}
    for row in rows:
        result[row.arm] = result.get(row.arm, 0) + row.correct
    return result


def _results(
    outcome: Outcome, comparison: Comparison, sweep: Comparison | None, evidence: Sequence[str]
) -> dict[str, Any]:
    pair = comparison.pair("baseline", "steered")
    tuning = None
    if sweep:
        tuning = {
            "gains": list(outcome.options.gains),
            "correct": dict(num_correct(outcome.tuning)),
            "chosen": _chosen_gain(outcome.plan),
            "comparison": sweep.to_dict(),
        }
    return {
        "verdict": pair.verdict,
        "sentence": pair.sentence,
        "evidence": evidence,
        "against_placebo": comparison.pair("placebo", "steered").sentence if outcome.placebo else None,
        "plan": _without_provenance(outcome.plan),
        "placebo": _without_provenance(outcome.placebo) if outcome.placebo else None,
        "tuning": tuning,
        "scores": _scores(outcome.scores) if outcome.scores else None,
        "firing": rounded(read_audit(outcome.folder / "test").rows),
        "comparison": comparison.to_dict(),
    }


def _by_both(outcome: Outcome) -> list[dict[str, Any]]:
    """What causes and nPMI say of the experts in the plan, which causes chose."""
    assert outcome.scores is not None
    npmi = scored(outcome.folder, outcome.options, "npmi")
    return [
        {
            "layer": entry.layer,
            "expert": entry.expert,
            "gain": entry.gain,
            "causes": place_of(outcome.scores, entry.layer, entry.expert),
            "npmi": place_of(npmi, entry.layer, entry.expert),
        }
        for entry in outcome.plan.experts
    ]


def _chosen_table(chosen: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in chosen:
        cells = [f"{one['layer']}:{one['expert']}", f"{one['gain']:g}", f"{one['causes']['rate']:.2%}"]
        for by in ("causes", "npmi"):
            cells += place_words(one[by])
        rows.append(cells)
    head = ["expert", "gain", "of all tokens", "d outcome / d log gain", "rank", "q", "nPMI score", "rank", "q"]
    return Table(head=head, rows=rows)


def place_words(place: Mapping[str, Any]) -> list[str]:
    """Score with interval, rank and q of ``place_of``, as cells of a table."""
    number = {name: "–" if place[name] is None else f"{place[name]:+.3f}" for name in ("score", "low", "high")}
    rank = "no support" if place["rank"] is None else f"{place['rank']} of {place['of']}"
    q = "–" if place["q"] is None else f"{place['q']:.1g}"
    return [minus(f"{number['score']} ({number['low']} to {number['high']})"), rank, q]


def _scores(scores: ExpertScores) -> Any:
    return rounded(
        {
            "markers": dict(zip(scores.marker_names, scores.occurrences, strict=True)),
            "coefficients": dict(zip(scores.marker_names, scores.coefficients, strict=True)),
            "num_traces": scores.num_traces,
            "num_tokens": scores.num_tokens,
            "num_problems": scores.num_problems,
            "tests": dict(zip(scores.marker_names, scores.tests, strict=True)),
            "tokens": {**scores.tokens, "references": scores.tokens["references"][:_BEST]},
            "families": scores.families,
            "best": [row._asdict() for row in scores.ranking()[:_BEST]],
            "fresh": fresh_record(one for one in scores.fresh if one.rank <= _BEST),
            "stability": scores.stability,
        }
    )


def _chosen_gain(plan: SteeringPlan) -> float | None:
    return plan.experts[0].gain if plan.experts else None


def _without_provenance(plan: SteeringPlan) -> dict[str, Any]:
    return {key: value for key, value in plan.to_dict().items() if key not in ("provenance", "model")}


def _figures(outcome: Outcome, sweep: Comparison | None) -> dict[str, str]:
    """Title -> SVG."""
    scores, result = outcome.scores, {}
    if scores is not None:
        by_causes = outcome.options.by == "causes"
        title = "What more gain does to going on" if by_causes else "Experts that fire at the start of a thought"
        result[title] = heat_map(scores, outcome.plan, outcome.placebo)
    if sweep is not None:
        points = [_dose(sweep, gain, gain_name(gain)) for gain in sorted(outcome.options.gains)]
        baseline = _dose(sweep, 1.0, "baseline")
        result["Choosing the gain, on the tuning problems"] = dose_response(
            points, baseline, _chosen_gain(outcome.plan)
        )
    if scores is not None and scores.ranking():
        result["How sure the ranking is"] = rank_stability(scores)
    if scores is not None and len(scores.families["families"]) > 1:
        result["Do domains share experts?"] = family_matrix(scores)
    return result


def _dose(sweep: Comparison, gain: float, arm: str) -> DosePoint:
    one = sweep.arm(arm)
    tokens = one.thinking_tokens or one.total_tokens
    assert tokens is not None
    accuracy = one.accuracy
    return DosePoint(gain, accuracy.mean, accuracy.low, accuracy.high, tokens.mean, tokens.low, tokens.high)


def _facts(outcome: Outcome) -> dict[str, str]:
    """Lines for the head of the page."""
    options, scores = outcome.options, outcome.scores
    result = {"Model": options.model, "Plan": _plan(outcome.plan)}
    if outcome.placebo:
        result["Placebo"] = _experts(outcome.placebo.experts)
    if scores is not None:
        markers = ", ".join(
            f"{name} {seen}" for name, seen in zip(scores.marker_names, scores.occurrences, strict=True)
        )
        result["Counted"] = f"{scores.num_traces} answers, {scores.num_tokens} tokens; markers: {markers}"
    result["Sampling"] = options.sampling_in_words
    return result


def _plan(plan: SteeringPlan) -> str:
    """Experts, then vectors, then other numbers of experts."""
    parts = [
        f"layer {e.layer} vector {e.file}, strength {e.strength:g} in unit {e.unit}, scope {e.scope}"
        for e in plan.residual
    ]
    parts += [f"top {e.k} at layer {e.layer}, scope {e.scope}" for e in plan.top_k]
    if plan.experts:
        parts.insert(
            0, _experts(plan.experts) + f", scope {plan.scope}" + (", renormalised" if plan.renormalize else "")
        )
    return "; ".join(parts)


def _experts(entries: Sequence[ExpertGain]) -> str:
    return ", ".join(f"layer {e.layer} expert {e.expert} {e.action}" for e in entries)
