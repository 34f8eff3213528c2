"""What a finished job has to say, and its one way out: results.json, the pages, the summary for the terminal."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_steer import SteeringPlan
from moe_steer.files import write_whole
from moe_steer.json_files import read_json
from reasoning_evals.comparing import Comparison
from reasoning_evals.report import NOTHING_MORE, Report, Rereading, Table, build_report, write_pages
from reasoning_evals.runs import read_audit, read_generations, read_run

RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A finished job as plain values. Nothing in ``results`` depends on time, path or machine: equal seeds give equal bytes."""

    folder: Path
    step: str
    """Folder, below the job's own, of the answers that the page shows; "" for the job's own."""
    title: str
    comparison: Comparison
    sweep: Comparison | None = None
    """The settings on the tuning problems, where some were tried."""
    results: Mapping[str, Any]
    """results.json, but for its version, warnings and comparisons."""
    summary: Sequence[str]
    """Lines for the terminal."""
    facts: Mapping[str, str]
    """Lines for the head of the page."""
    warnings: Sequence[str] = ()
    """What a reader has to know before the numbers, one sentence each."""
    silent: Sequence[str] = ()
    """One sentence for every arm that changed nothing: --strict fails on them."""
    above: Sequence[str] = ()
    """What the arms rest on, one sentence each: above the verdict, which keeps its place."""
    headline: Sequence[str] = ()
    """Sentences in place of the verdict, for questions other than accuracy."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    """Title -> SVG."""
    max_examples: int = 6
    config: Mapping[str, Any] | None = None
    """What the page shows as the run's settings; default the job's options and those of the step."""
    then: Sequence[str] = ()
    """What to look at after the page: commands, each with what it shows. ``{folder}`` is the job's."""
    parts: Mapping[str, Report] = field(default_factory=dict)
    """Folder below the job's own -> a page of its own."""


def publish(findings: Findings, asked: Rereading = NOTHING_MORE) -> str:
    """Write results.json, report.md and report.html; returns the summary. ``asked``: what the page adds to the run's own."""
    folder = findings.folder
    write_results(folder, {"version": 1, "warnings": list(findings.warnings), **findings.results})
    for name, part in findings.parts.items():
        write_pages(part, folder / name)
    report = build_report(
        folder / findings.step,
        findings.comparison,
        title=findings.title,
        figures=findings.figures,
        facts={**findings.facts, **{f"Warning {n}": text for n, text in enumerate(findings.warnings, 1)}},
        max_examples=findings.max_examples,
    )
    above = [*findings.above, *report.above]
    report = dataclasses.replace(report, above=above, headline=findings.headline, tables=findings.tables)
    report = asked.added_to(report, folder / findings.step)
    if findings.step:
        run = read_run(folder)
        config = findings.config or {"options": run["config"], findings.step: report.run["config"]}
        report = dataclasses.replace(report, run=run | {"config": config})
    write_pages(report, folder)
    warnings = [f"WARNING: {warning}" for warning in findings.warnings]
    then = ["open the report in a browser", *(line.format(folder=shlex.quote(str(folder))) for line in findings.then)]
    return "\n".join(
        [
            "",
            *report.above,
            *findings.summary,
            *report.read_again,
            *warnings,
            f"report: {folder / 'report.html'}",
            *(f"{'next:' if line == then[0] else '':5} {line}" for line in then),
        ]
    )


def arm_lines(comparison: Comparison) -> list[str]:
    """One line an arm for the terminal: accuracy with its interval, thinking tokens, thoughts that never closed."""
    width = max(10, *(len(arm.name) for arm in comparison.arms))
    lines = []
    for arm in comparison.arms:
        tokens = f"  {arm.thinking_tokens.mean:7.1f} thinking tokens" if arm.thinking_tokens else ""
        accuracy = arm.accuracy
        lines.append(
            f"{arm.name:{width}} {100 * accuracy.mean:5.1f}% correct ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"
            f"{tokens}  {100 * arm.truncated:4.1f}% never closed"
        )
    return lines


def write_results(folder: Path, values: Mapping[str, Any]) -> None:
    """results.json, the same bytes for the same values."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / RESULTS_FILE, text)


def read_results(folder: Path, job: str) -> dict[str, Any]:
    """What ``write_results`` wrote; ValueError, with what to do, for a job that is not finished."""
    again = f"start launch/{job}.py again, it continues where it was"
    values = read_json(folder / RESULTS_FILE, again, missing=f"{folder} holds an unfinished job: {again}")
    if not isinstance(values.get("warnings"), list):
        raise ValueError(f"{folder / RESULTS_FILE} is not what a job wrote, it lists no warnings: {again}")
    return values


def nothing_fired(plan: SteeringPlan, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a run under ``plan`` was not steered as far as is known, or None. ``rows``: its audit. A neutral plan is not meant to fire."""
    if plan.is_neutral or any(row.get("tokens") for row in rows):
        return None
    if not rows:
        return (
            "whether the plan fired is not known, the run has lost its audit (audit.jsonl): restore it, or sample again"
        )
    scopes = ({plan.scope} if plan.active_experts else set()) | {entry.scope for entry in plan.active_residual}
    scopes |= {entry.scope for entry in plan.top_k}
    whens = [*(one.when for one in plan.active_experts), *(one.when for one in plan.active_residual)]
    opened = " while its gate was open" if any(whens) else ""
    counted = f" and {len(plan.top_k)} top_k entries" if plan.top_k else ""
    return (
        f"nothing of the plan fired in the whole run: none of its {len(plan.active_experts)} experts and "
        f"{len(plan.active_residual)} vectors{counted} met a token in scope {', '.join(sorted(scopes))}{opened}; the arm equals the baseline"
    )


def said(*folders: Path) -> dict[str, dict[tuple[str, str, int], int]]:
    """Arm -> a hash of every sample in the run folders: equal where two arms said the same, token by token."""
    found: dict[str, dict[tuple[str, str, int], int]] = defaultdict(dict)
    for folder in folders:
        for item in read_generations(folder):
            found[item.arm][folder.name, item.problem_id, item.sample_idx] = hash((item.text, item.token_ids))
    return found


def silent_arms(plans: Mapping[str, SteeringPlan | None], baseline: str, *folders: Path) -> list[str]:
    """One sentence for every arm that changed nothing in all of the run folders: its plan never fired, or every sample equals
    the baseline's. ``plans``: arm -> its plan, None for prompts and decoding rules."""
    firing: dict[str, list[Mapping[str, Any]]] = {name: [] for name in plans}
    for folder in folders:
        for name, rows in read_audit(folder).rows.items():
            firing[name] += rows
    samples = said(*folders)
    found = []
    for name, plan in plans.items():
        if plan and (problem := nothing_fired(plan, firing[name])):
            found.append(f"{name}: {problem}")
        elif name != baseline and samples[name] == samples[baseline]:
            found.append(f"{name}: every sample equals the one of {baseline}, token by token; the arm changed nothing")
    return found
