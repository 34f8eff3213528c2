"""The page of the controls: what was expected of each, what was found, and what causes and nPMI say of the planted experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_stats import ExpertScores, heat_map
from launch.jobs.experts_findings import place_words
from moe_steer import SteeringPlan
from reasoning_evals.report import PlainPage, Table, minus


def page_of(found: Sequence[Mapping[str, Any]], folder: Path) -> PlainPage:
    """The page of all controls. ``found``: what each found, as results.json has it; ``folder``: where their runs are."""
    passed = sum(one["passed"] for one in found)
    notes = [f"{passed} of {len(found)} controls passed."]
    for one in found:
        notes.append(
            f"{one['name']}: {'passed' if one['passed'] else 'FAILED'}. Expected: {one['expected']}. Found: {one['sentence']}"
        )
        notes += [f"{one['name']}: {line}" for line in one["evidence"]]
        notes.append(f"{one['name']}: the page of its own run is {one['name']}/report.html.")
        if one["every_sample_equal"]:
            notes.append(f"{one['name']}: every sample equals the one of the baseline, token by token.")
        if one["smallest_of"] == "the baseline":
            notes.append(
                f"{one['name']}: the smallest effect is planned from the baseline alone, as the pair has no spread: both arms drawn anew, an effect "
                "that varies by 10 points between problems."
            )
    figures = {
        f"{one['name']}: every expert by {one['by']}": heat_map(
            ExpertScores.load(folder / one["name"] / "scores.json"),
            SteeringPlan.load(folder / one["name"] / "plan.json"),
        )
        for one in found
    }
    tables = {
        "What was found": _found_table(found),
        "The planted experts, by causes and by nPMI": _planted_table(found),
    }
    return PlainPage(
        title="Does the main job find what is there, and nothing else?", notes=notes, tables=tables, figures=figures
    )


def _found_table(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = {
        "control": lambda one: one["name"],
        "control says": lambda one: "passed" if one["passed"] else "FAILED",
        "verdict": lambda one: one["verdict"],
        "expert chosen": lambda one: ":".join(map(str, one["expert"])),
        "gain chosen": lambda one: f"{one['gain']:g}",
        "points (95%)": lambda one: _reach(one["points"]),
        "smallest effect that could have been shown": lambda one: _least(one["smallest_shown"]),
        "correct: " + " / ".join(found[0]["accuracy"]): lambda one: " / ".join(
            f"{100 * value:.1f}%" for value in one["accuracy"].values()
        ),
    }
    return Table.of(found, columns)


def _reach(points: Mapping[str, float]) -> str:
    return f"{_points(points['mean'])} ({_points(points['low'])} to {_points(points['high'])})"


def _least(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _planted_table(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in found:
        if place := one.get("planted"):
            for name, words in (
                ("causes", f"causes: d log-odds of going on / d log gain; {place['verdict']}"),
                ("npmi_at_failures", f"nPMI at {place['marker']}"),
                ("npmi_as_rice", "nPMI as RICE asks: <think> less </think> and Alternatively"),
            ):
                rows.append(
                    [
                        one["name"],
                        f"{place['layer']}:{place['expert']}",
                        f"{place[name]['rate']:.2%}",
                        words,
                        *place_words(place[name]),
                    ]
                )
    return Table(head=["control", "planted", "of all tokens", "by", "score (95%)", "rank", "q"], rows=rows)


def _points(share: float) -> str:
    return minus(f"{100 * share:+.1f}")


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a control."""
    return "\n".join(f"{'passed' if one['passed'] else 'FAILED'}  {one['name']}: {one['sentence']}" for one in found)
