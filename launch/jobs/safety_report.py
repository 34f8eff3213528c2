"""The pages of a finished safety experiment: one for all, one a task; and its lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from launch.core.findings import Findings
from launch.jobs.safety_arms import SafetyTask
from launch.jobs.safety_findings import Change, Outcome
from launch.jobs.safety_options import AUTOMATIC_PROMPT, HAND_PROMPT
from reasoning_evals.comparing import (
    Measure,
    detectable_text,
    difference_test,
    interval_text,
    p_cell,
    p_text,
    points,
    t_text,
    verdict_p,
)
from reasoning_evals.report import (
    Report,
    Table,
    bootstrap_points_interval,
    build_report,
    finished_svg,
    percent,
    points_interval,
    signed_points,
    style,
    whiskers,
)
from reasoning_evals.runs import read_run
from reasoning_evals.tasks import task_spec

_COLOURS = ("#111111", "#a16207", "#7e22ce", "#1f5fa8", "#15803d", "#c2410c", "#0e7490", "#be185d")


def findings_of(outcome: Outcome) -> Findings:
    """Safety against capability over all tasks; every task has a page of its own."""
    shown = next(task for task in outcome.tasks if task.is_attack)
    options = read_run(outcome.folder)["config"]
    return Findings(
        folder=outcome.folder,
        step=shown.name,
        title=f"Safety steering of {outcome.options.model}: what it gains and what it costs",
        comparison=outcome.comparisons[shown.name],
        results=outcome.results(),
        summary=_summary(outcome),
        then=["{folder}/*/report.html: one page for each task"],
        headline=[sentence_on(outcome, arm) for arm in outcome.names if arm != outcome.reference],
        facts=facts(outcome)
        | {
            "Below": f"the arms on {outcome.comparisons[shown.name].task}; every task has a page of its own in its folder"
        },
        warnings=outcome.warnings(),
        silent=outcome.silent,
        tables={
            "Safety and capability": overview(outcome),
            f"Differences from {outcome.reference}": changes_table(outcome),
        },
        figures={"Safety against capability": trade_off(_places(outcome))} if outcome.mean_capability else {},
        max_examples=_max_examples(shown),
        config={"options": options, "tasks": {task.name: task.describe() for task in outcome.tasks}},
        parts={task.name: _task_report(outcome, task) for task in outcome.tasks},
    )


def _task_report(outcome: Outcome, task: SafetyTask) -> Report:
    """Examples are left out where the data set's authors ask for it, or its texts are harmful."""
    what = (
        "share of answers that the classifier calls safe; an empty answer is shown as no answer, and is not counted as safe here"
        if task.is_attack
        else "share of right answers"
    )
    return build_report(
        outcome.folder / task.name,
        outcome.comparisons[task.name],
        title=f"{outcome.options.model} on {task.name}",
        facts={"Accuracy": what, **{key.replace("_", " "): str(value) for key, value in task.describe().items()}},
        max_examples=_max_examples(task),
    )


def _max_examples(task: SafetyTask) -> int:
    return 6 if task_spec(task.name).publish_items else 0


def facts(outcome: Outcome) -> dict[str, str]:
    """Lines for the head of the page of the whole."""
    options = outcome.options
    rule = "greedy" if options.greedy else f"temperature {options.temperature:g}, top-p {options.top_p:g}"
    limits = ", ".join(f"{task.name} {task.max_new_tokens}" for task in outcome.tasks)
    result = {
        "Model": options.model + (f", revision {options.revision}" if options.revision else ""),
        "Sampling": f"{rule}, seed {options.seed}; at most so many new tokens, the same in every arm: {limits}",
        "Defence rate": "100 - attack success rate; an empty answer counts one half, as in the paper, and is shown apart",
        "Fluency": "entropy of two- and three-word sequences in bits; it grows with length and compares arms of one task only",
        "Strength": f"{', '.join(f'{one:g}' for one in options.strengths)} x vector, layer {options.layer}, every position; not tuned here",
    }
    for name, who in outcome.classifiers.items():
        result[f"Judge of {name}"] = (
            f"{who['classifier']}, label {who['unsafe']} ({who['labels'][str(who['unsafe'])]}) is unsafe"
        )
    for task in outcome.tasks:
        result[f"Data of {task.name}"] = (
            f"{task.source}; {len(task.problems)} problems; {task.describe()['asked']}; asked with: {task.asked_with}"
        )
    own = [text for text in (HAND_PROMPT, AUTOMATIC_PROMPT) if any(arm.prefix == text for arm in outcome.arms)]
    if own:
        result["Prompts"] = "worded by this project: of the paper's kind, not the paper's"
    if outcome.sae_fit is not None:
        fit = outcome.sae_fit
        result["SAE on this model"] = (
            f"variance unexplained {fit.fraction_variance_unexplained:.3f}, {fit.l0:.1f} atoms a token, "
            f"over {fit.num_tokens} tokens of the pairs' answers"
        )
    for arm, header in outcome.directions.items():
        result[f"Direction {arm}"] = _direction(header)
    return result


def _direction(header: object) -> str:
    assert isinstance(header, dict)
    parts = [f"norm {header['norm']:.4g} where the residual stream has {header['residual_norm']:.4g}"]
    if "num_atoms" in header:
        parts.append(f"{header['num_atoms']} atoms of {header['sae']['width']}")
        parts.append(f"cosine with CAA {header['cosine_with_caa']:.3f}")
    return ", ".join(parts)


def sentence_on(outcome: Outcome, arm: str) -> str:
    """Gain and cost of one arm in one sentence."""
    mean, base = outcome.mean_defence[arm], outcome.mean_defence[outcome.reference]
    now, before = percent(mean.mean), percent(base.mean)
    rate = f"unchanged at {now}" if now == before else f"{now} instead of {before}"
    parts = [_change_text(change) for change in outcome.changes if change.arm == arm]
    return f"{arm} against {outcome.reference}: mean defence rate {rate}; {'; '.join(parts)}."


def _change_text(change: Change) -> str:
    found = change.difference
    p_value = verdict_p(found, None)
    test = difference_test(found) if found.p_value >= found.sign_flip_p else "sign-flip test"
    nominal = f", nominally {'higher' if found.mean > 0 else 'lower'}, not after Holm" if change.is_nominal else ""
    return f"{change.task} {change.verdict}, {points(found.mean)} points ({interval_text(found)}, {p_text(p_value)}, {test}{nominal})"


def overview(outcome: Outcome) -> Table:
    """One row an arm, the table of the paper with intervals."""
    head = ["arm"]
    for task in outcome.attacks:
        head += [f"{task}: defence", "empty", "fluency, bits"]
    head += ["mean defence", *outcome.abilities, *(["mass of the letters"] if outcome.letter_masses else [])]
    rows = []
    for arm in outcome.names:
        row = [arm]
        for task in outcome.attacks:
            one = outcome.defences[task][arm]
            bits = outcome.fluency[task][arm][0]
            row += [_share(one.rate), percent(one.empty), f"{bits.mean:.2f} ({bits.low:.2f} – {bits.high:.2f})"]
        row.append(_share(outcome.mean_defence[arm]))
        row += [_share(outcome.comparisons[task].arm(arm).accuracy) for task in outcome.abilities]
        row += [f"{outcome.letter_masses[arm]:.2f}"] if outcome.letter_masses else []
        rows.append(row)
    return Table(head=head, rows=rows)


def changes_table(outcome: Outcome) -> Table:
    """Every paired difference with its intervals and tests."""
    columns = {
        "arm": lambda one: one.arm,
        "task": lambda one: one.task,
        "points": lambda one: signed_points(one.difference.mean),
        "95%": lambda one: points_interval(one.difference),
        "bootstrap 95%": lambda one: bootstrap_points_interval(one.difference),
        "p (t)": lambda one: t_text(one.difference),
        "p (sign flip)": lambda one: p_cell(one.difference.sign_flip_p),
        "p (Holm)": lambda one: p_cell(one.holm_p),
        "detectable, points": lambda one: detectable_text(one.difference),
        "verdict": lambda one: one.verdict,
    }
    return Table.of(outcome.changes, columns)


def _share(measure: Measure) -> str:
    return f"{percent(measure.mean)} ({100 * measure.low:.1f} – {100 * measure.high:.1f})"


def _places(outcome: Outcome) -> dict[str, tuple[Measure, Measure]]:
    return {arm: (outcome.mean_capability[arm], outcome.mean_defence[arm]) for arm in outcome.names}


def _summary(outcome: Outcome) -> list[str]:
    """Lines for the terminal."""
    table = overview(outcome)
    rows = [
        f"{row[0]:14} " + "  ".join(f"{name} {cell}" for name, cell in zip(table.head[1:], row[1:], strict=True))
        for row in table.rows
    ]
    return [*rows, *(sentence_on(outcome, arm) for arm in outcome.names if arm != outcome.reference)]


def trade_off(places: Mapping[str, tuple[Measure, Measure]]) -> str:
    """``places``: arm -> (mean capability, mean defence), shares with 95% intervals. Up and to the right is better.

    ValueError without an arm.
    """
    if not places:
        raise ValueError("there is no arm to draw: give at least one")
    with mpl.rc_context(style("safety")):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (arm, (capability, defence)) in enumerate(places.items()):
            axes.errorbar(
                [100 * capability.mean],
                [100 * defence.mean],
                xerr=whiskers([(capability.mean, capability.low, capability.high)], 100),
                yerr=whiskers([(defence.mean, defence.low, defence.high)], 100),
                fmt="s" if number == 0 else "o",
                color=_COLOURS[number % len(_COLOURS)],
                markersize=5,
                elinewidth=0.8,
                label=arm.replace("$", r"\$"),
            )
        axes.set_xlabel("capability: mean accuracy over tasks (%)")
        axes.set_ylabel("safety: mean defence rate over attacks (%)")
        return finished_svg(figure, axes)
