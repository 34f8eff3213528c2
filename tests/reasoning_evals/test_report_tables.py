"""Headlines, tables and the frontier that a caller adds to a report."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from graded_rows import table
from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.report import Report, render_html, render_markdown
from reasoning_evals.report.build import ProblemOutcome, Table
from reasoning_evals.report.figures import ArmPoint, frontier

BASE = ArmPoint("baseline", 100.0, 95.0, 105.0, 0.8, 0.75, 0.85)


def test_the_frontier_draws_every_setting_and_is_the_same_every_time() -> None:
    curves = {
        "caa L2": [ArmPoint("a", 80, 75, 85, 0.8, 0.7, 0.9), ArmPoint("b", 60, 50, 70, 0.5, 0.4, 0.6)],
        "$odd <method>": [ArmPoint("c", 90, 85, 95, 1.0, 1.0, 1.0)],
    }
    drawn = frontier(curves, BASE, ["b"])
    assert drawn == frontier(curves, BASE, ["b"])
    assert drawn != frontier(curves, BASE)
    ElementTree.fromstring(drawn)


def test_a_frontier_needs_a_curve() -> None:
    with pytest.raises(ValueError, match="there is no curve to draw"):
        frontier({}, BASE)


def test_headline_and_tables_stand_on_both_pages_and_stay_inert() -> None:
    hostile = "<script>alert(1)</script> | a"
    report = Report(
        title="t",
        comparison=compare_arms(table({"baseline": ["10", "11"], "x": ["11", "10"]})),
        problems={
            name: tuple(ProblemOutcome(problem_id=f"p{i}", accuracy=0.5, total_tokens=40) for i in range(2))
            for name in ("baseline", "x")
        },
        lengths={},
        lengths_are_thoughts=True,
        headline=["x: shorter, accuracy held.", hostile],
        tables={"Length and cost": Table(head=("arm", "change"), rows=(("x", "-10.0%"), (hostile, "y" * 60)))},
    )
    page, text = render_html(report), render_markdown(report)
    assert page.index("x: shorter, accuracy held.") < page.index("Length and cost") < page.index("Paired differences")
    assert "<script" not in page
    assert "**x: shorter, accuracy held.**" in text
    row = next(line for line in text.splitlines() if "alert" in line and line.startswith("|"))
    assert row.replace("\\|", "").count("|") == 3, "a bar in a cell opens no column"
