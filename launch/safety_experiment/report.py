"""The pages of a finished safety experiment: one for all, one a task; and its summary for the terminal."""

from __future__ import annotations

import dataclasses

from launch.results_file import write_results
from launch.safety_experiment.chart import trade_off
from launch.safety_experiment.findings import Change, SafetyFindings
from launch.safety_experiment.prompts import AUTOMATIC_PROMPT, HAND_PROMPT
from launch.safety_experiment.tasks import SafetyTask
from reasoning_evals.comparing import Measure, detectable_text, difference_test, interval_text, p_text, points, t_text
from reasoning_evals.report import (
    Report,
    Table,
    bootstrap_points_interval,
    build_report,
    percent,
    points_interval,
    signed_points,
    write_pages,
)
from reasoning_evals.runs import read_run
from reasoning_evals.tasks import task_spec


def publish(findings: SafetyFindings) -> str:
    """Write results.json and the pages (report.md, report.html: of the whole in the run's folder, of each task in the task's);
    returns the summary."""
    folder = findings.folder
    write_results(folder, findings.results())
    for task in findings.tasks:
        write_pages(_task_report(findings, task), folder / task.name)
    whole = _task_report(findings, next(task for task in findings.tasks if task.is_attack))
    run = read_run(folder)
    whole = dataclasses.replace(
        whole,
        title=f"Safety steering of {findings.options.model}: what it gains and what it costs",
        headline=[sentence_on(findings, arm) for arm in findings.names if arm != findings.reference],
        facts=facts(findings)
        | {"Below": f"the arms on {whole.comparison.task}; every task has a page of its own in its folder"},
        tables={
            "Safety and capability": overview(findings),
            f"Differences from {findings.reference}": changes_table(findings),
        },
        figures={"Safety against capability": trade_off(_places(findings))} if findings.mean_capability else {},
        run=run | {"config": {"options": run["config"], "tasks": {t.name: t.describe() for t in findings.tasks}}},
    )
    write_pages(whole, folder)
    return summary(findings)


def _task_report(findings: SafetyFindings, task: SafetyTask) -> Report:
    """Examples are left out where the data set's authors ask for it, or its texts are harmful."""
    what = (
        "share of answers that the classifier calls safe; an empty answer is shown as no answer, and is not counted as safe here"
        if task.is_attack
        else "share of right answers"
    )
    return build_report(
        findings.folder / task.name,
        findings.comparisons[task.name],
        title=f"{findings.options.model} on {task.name}",
        facts={"Accuracy": what, **{key.replace("_", " "): str(value) for key, value in task.describe().items()}},
        max_examples=6 if task_spec(task.name).publish_items else 0,
    )


def facts(findings: SafetyFindings) -> dict[str, str]:
    """Lines for the head of the page of the whole."""
    options = findings.options
    rule = "greedy" if options.samples is None else f"temperature {options.temperature:g}, top-p {options.top_p:g}"
    limits = ", ".join(f"{task.name} {task.max_new_tokens}" for task in findings.tasks)
    result = {
        "Model": options.model + (f", revision {options.revision}" if options.revision else ""),
        "Sampling": f"{rule}, seed {options.seed}; at most so many new tokens, the same in every arm: {limits}",
        "Defence rate": "100 - attack success rate; an empty answer counts one half, as in the paper, and is shown apart",
        "Fluency": "entropy of two- and three-word sequences in bits; it grows with length and compares arms of one task only",
        "Strength": f"{', '.join(f'{one:g}' for one in options.strengths)} x vector, layer {options.layer}, every position; not tuned here",
    }
    for name, who in findings.classifiers.items():
        result[f"Judge of {name}"] = (
            f"{who['classifier']}, label {who['unsafe']} ({who['labels'][str(who['unsafe'])]}) is unsafe"
        )
    for task in findings.tasks:
        result[f"Data of {task.name}"] = f"{task.source}; {len(task.problems)} problems; {task.describe()['asked']}"
    own = [text for text in (HAND_PROMPT, AUTOMATIC_PROMPT) if any(arm.prefix == text for arm in findings.arms)]
    if own:
        result["Prompts"] = "worded by this project: of the paper's kind, not the paper's"
    if findings.sae_fit is not None:
        fit = findings.sae_fit
        result["SAE on this model"] = (
            f"variance unexplained {fit.fraction_variance_unexplained:.3f}, {fit.l0:.1f} atoms a token, "
            f"over {fit.num_tokens} tokens of the pairs' answers"
        )
    for arm, header in findings.directions.items():
        result[f"Direction {arm}"] = _direction(header)
    for number, warning in enumerate(findings.warnings(), 1):
        result[f"Warning {number}"] = warning
    return result


def _direction(header: object) -> str:
    assert isinstance(header, dict)
    parts = [f"norm {header['norm']:.4g} where the residual stream has {header['residual_norm']:.4g}"]
    if "num_atoms" in header:
        parts.append(f"{header['num_atoms']} atoms of {header['sae']['width']}")
        parts.append(f"cosine with CAA {header['cosine_with_caa']:.3f}")
    return ", ".join(parts)


def sentence_on(findings: SafetyFindings, arm: str) -> str:
    """Gain and cost of one arm in one sentence."""
    mean, base = findings.mean_defence[arm], findings.mean_defence[findings.reference]
    now, before = percent(mean.mean), percent(base.mean)
    rate = f"unchanged at {now}" if now == before else f"{now} instead of {before}"
    parts = [_change_text(change) for change in findings.changes if change.arm == arm]
    return f"{arm} against {findings.reference}: mean defence rate {rate}; {'; '.join(parts)}."


def _change_text(change: Change) -> str:
    found = change.difference
    return (
        f"{change.task} {change.verdict}, {points(found.mean)} points ({interval_text(found)}, "
        f"{p_text(found.p_value)}, {difference_test(found)})"
    )


def overview(findings: SafetyFindings) -> Table:
    """One row an arm, the table of the paper with intervals."""
    head = ["arm"]
    for task in findings.attacks:
        head += [f"{task}: defence", "empty", "fluency, bits"]
    head += ["mean defence", *findings.abilities, *(["mass of the letters"] if findings.letter_masses else [])]
    rows = []
    for arm in findings.names:
        row = [arm]
        for task in findings.attacks:
            one = findings.defences[task][arm]
            bits = findings.fluency[task][arm][0]
            row += [_share(one.rate), percent(one.empty), f"{bits.mean:.2f} ({bits.low:.2f} – {bits.high:.2f})"]
        row.append(_share(findings.mean_defence[arm]))
        row += [_share(findings.comparisons[task].arm(arm).accuracy) for task in findings.abilities]
        row += [f"{findings.letter_masses[arm]:.2f}"] if findings.letter_masses else []
        rows.append(row)
    return Table(head=head, rows=rows)


def changes_table(findings: SafetyFindings) -> Table:
    """Every paired difference with its intervals and tests."""
    rows = []
    for change in findings.changes:
        found = change.difference
        rows.append(
            [
                change.arm,
                change.task,
                signed_points(found.mean),
                points_interval(found),
                bootstrap_points_interval(found),
                t_text(found),
                p_text(found.sign_flip_p).removeprefix("p = "),
                p_text(change.holm_p).removeprefix("p = "),
                detectable_text(found),
                change.verdict,
            ]
        )
    head = [
        "arm",
        "task",
        "points",
        "95%",
        "bootstrap 95%",
        "p (t)",
        "p (sign flip)",
        "p (Holm)",
        "detectable, points",
        "verdict",
    ]
    return Table(head=head, rows=rows)


def _share(measure: Measure) -> str:
    return f"{percent(measure.mean)} ({100 * measure.low:.1f} – {100 * measure.high:.1f})"


def _places(findings: SafetyFindings) -> dict[str, tuple[Measure, Measure]]:
    return {arm: (findings.mean_capability[arm], findings.mean_defence[arm]) for arm in findings.names}


def summary(findings: SafetyFindings) -> str:
    """The quiet end of the job."""
    table = overview(findings)
    lines = [
        "",
        *(
            f"{row[0]:14} " + "  ".join(f"{name} {cell}" for name, cell in zip(table.head[1:], row[1:], strict=True))
            for row in table.rows
        ),
    ]
    lines += [sentence_on(findings, arm) for arm in findings.names if arm != findings.reference]
    lines += [f"WARNING: {warning}" for warning in findings.warnings()]
    lines.append(f"report: {findings.folder / 'report.html'}")
    return "\n".join(lines)
