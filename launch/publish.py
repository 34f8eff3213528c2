"""The pages of a finished main job, and its summary for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from expert_stats import DosePoint, dose_response, heat_map, rank_stability
from launch.findings import Findings, sweep_points
from moe_steer import ExpertGain, SteeringPlan
from reasoning_evals.comparing import Comparison
from reasoning_evals.report import build_report, write_pages
from reasoning_evals.runs import read_run


def publish(findings: Findings) -> str:
    """Write results.json, plan.json, report.md and report.html; returns the summary."""
    findings.write()
    folder = findings.folder
    report = build_report(
        folder / "test",
        findings.comparison,
        title=title(findings),
        figures=figures(findings),
        audit=findings.firing,
        facts=facts(findings),
    )
    run = read_run(folder)
    report = dataclasses.replace(report, run=run | {"config": {"options": run["config"], "test": report.run["config"]}})
    write_pages(report, folder)
    return summary(findings)


def title(findings: Findings) -> str:
    """The question of the page."""
    model = findings.options.model
    return f"Does the plan help {model}?" if findings.plan.residual else f"Do the thinking experts of {model} help?"


def figures(findings: Findings) -> dict[str, str]:
    """Title -> SVG."""
    result = {}
    if findings.scores is not None:
        result["Experts that fire at the start of a thought"] = heat_map(
            findings.scores, findings.plan, findings.placebo
        )
    sweep = findings.sweep
    if sweep is not None:
        points = [_dose(sweep, gain, arm) for gain, arm in sweep_points(findings)]
        baseline = next(point for point in points if point.gain == 1.0)
        chosen = findings.plan.experts[0].gain if findings.plan.experts else None
        result["Choosing the gain, on the tuning problems"] = dose_response(
            [point for point in points if point.gain != 1.0], baseline, chosen
        )
    if findings.scores is not None and findings.scores.ranking():
        result["How sure the ranking is"] = rank_stability(findings.scores)
    return result


def _dose(sweep: Comparison, gain: float, arm: str) -> DosePoint:
    one = sweep.arm(arm)
    tokens = one.thinking_tokens or one.total_tokens
    assert tokens is not None
    accuracy = one.accuracy
    return DosePoint(gain, accuracy.mean, accuracy.low, accuracy.high, tokens.mean, tokens.low, tokens.high)


def facts(findings: Findings) -> Mapping[str, str]:
    """Lines for the head of the report."""
    options, scores = findings.options, findings.scores
    result = {
        "Model": options.model,
        "Plan": _plan(findings.plan),
    }
    if findings.placebo:
        result["Placebo"] = _experts(findings.placebo.experts)
    if scores is not None:
        markers = ", ".join(
            f"{name} {seen}" for name, seen in zip(scores.marker_names, scores.occurrences, strict=True)
        )
        result["Counted"] = f"{scores.num_traces} answers, {scores.num_tokens} tokens; markers: {markers}"
    rule = "greedy" if options.greedy else f"temperature {options.temperature:g}, top-p {options.top_p:g}"
    result["Sampling"] = f"{rule}, at most {options.token_limit} new tokens, seed {options.seed}"
    for number, warning in enumerate(findings.warnings(), 1):
        result[f"Warning {number}"] = warning
    return result


def _plan(plan: SteeringPlan) -> str:
    """Experts, then vectors."""
    parts = [
        f"layer {e.layer} vector {e.file}, strength {e.strength:g} in unit {e.unit}, scope {e.scope}"
        for e in plan.residual
    ]
    if plan.experts:
        parts.insert(
            0, _experts(plan.experts) + f", scope {plan.scope}" + (", renormalised" if plan.renormalize else "")
        )
    return "; ".join(parts)


def _experts(entries: Sequence[ExpertGain]) -> str:
    return ", ".join(f"layer {e.layer} expert {e.expert} x{e.gain:g}" for e in entries)


def summary(findings: Findings) -> str:
    """The quiet end of the job."""
    comparison = findings.comparison
    lines = [""]
    for arm in comparison.arms:
        tokens = f"  {arm.thinking_tokens.mean:7.1f} thinking tokens" if arm.thinking_tokens else ""
        accuracy = arm.accuracy
        lines.append(
            f"{arm.name:10} {100 * accuracy.mean:5.1f}% correct ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"
            f"{tokens}  {100 * arm.truncated:4.1f}% truncated"
        )
    lines += [pair.sentence for pair in comparison.pairs]
    lines += [f"WARNING: {warning}" for warning in findings.warnings()]
    lines.append(f"report: {Path(findings.folder, 'report.html')}")
    return "\n".join(lines)
