"""Headlines, tables and the frontier that a caller adds to a report; many arms, long names and colours that can be read."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html import escape

import pytest

from graded_rows import table
from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.report import Report, charts, render_html, render_markdown
from reasoning_evals.report.build import ProblemOutcome, Table
from reasoning_evals.report.figures import ArmPoint, frontier
from reasoning_evals.report.page import template_text

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


def many_arms(num: int, names: str = "plan:folder/of/plans/layer-{:02d}-gain-4.json") -> Report:
    """Arms with long names that differ near their ends; the last one helps."""
    patterns = {names.format(i): ["0"] * 30 for i in range(num - 1)} | {names.format(num - 1): ["1"] * 20 + ["0"] * 10}
    patterns = {"baseline": ["0"] * 30, **patterns}
    return Report(
        title="t",
        comparison=compare_arms(table(patterns)),
        problems={
            name: tuple(
                ProblemOutcome(problem_id=f"p{i}", accuracy=float(x), total_tokens=40) for i, x in enumerate(row)
            )
            for name, row in patterns.items()
        },
        lengths={name: list(range(1, 32)) for name in patterns},
        lengths_are_thoughts=True,
    )


@pytest.mark.parametrize("num", [2, 6, 39])
def test_with_many_arms_the_first_line_speaks_of_all_and_the_rest_is_folded(num: int) -> None:
    """The first pair alone, "No effect shown" in large letters, would be read as the result of all."""
    report = many_arms(num)
    page = render_html(report)
    assert f'<p class="word">Of {num} arms 1 helped, none hurt</p>' in page
    assert ("comparisons in words" in page) == (num > 8)
    for pair in report.comparison.pairs:
        assert page.split("<section>")[0].count(escape(pair.sentence)) == 1


def test_long_names_stay_different_and_names_do_not_lie_on_each_other() -> None:
    report = many_arms(39)
    forest = charts.difference_forest(report) or ""
    rows = [text.text for text in ElementTree.fromstring(forest).iter("text") if text.get("class") == "row-name"]
    assert len(set(rows)) == len(rows) == 39
    lengths = charts.length_distributions(report) or ""
    rows = [text.text for text in ElementTree.fromstring(lengths).iter("text") if text.get("class") == "row-name"]
    assert len(set(rows)) == len(rows) == 40
    scatter = ElementTree.fromstring(charts.accuracy_against_tokens(report) or "")
    names = [text for text in scatter.iter("text") if (text.get("class") or "").startswith("name")]
    assert 2 <= len(names) < 40, "most marks lie on one another: not all can have a name"
    assert len({(text.get("x"), text.get("y")) for text in names}) == len(names)
    assert "some have no name" in render_html(report)


def test_a_histogram_shows_no_gaps_that_lengths_have_not() -> None:
    """As many lengths of 1, 2, ... 31 tokens: one flat area. Bins narrower than a token would be empty here and there."""
    drawn = charts.length_distributions(many_arms(2)) or ""
    area = next(path for path in ElementTree.fromstring(drawn).iter("path") if "area" in (path.get("class") or ""))
    heights = [point.split(",")[1] for point in re.findall(r"[\d.]+,[\d.]+", (area.get("d") or "").replace(" ", ","))]
    ground = heights[0]
    assert heights[-1] == ground
    assert heights[:3] == [ground] * 3, "no thought has 0 tokens"
    assert len(set(heights[3:-1]) | {ground}) == 2
    assert ground not in heights[3:-1]


def test_letters_keep_their_contrast_in_every_colour_of_the_page() -> None:
    """4.5 to 1 (WCAG AA): names of arms, verdicts and soft text on card and page; and paper is light."""
    style = template_text("style.css")
    light, dark = re.findall(r":root \{(.*?)\n ?\s*\}", style, re.DOTALL)[:2]
    for scheme in (light, dark):
        colour = dict(re.findall(r"--([\w-]+): (#\w+);", scheme))
        inks = [*(f"arm{i}" for i in range(6)), "good", "bad", "ink", "soft"]
        assert {
            name: contrast(colour[name], colour["card"])
            for name in inks
            if contrast(colour[name], colour["card"]) < 4.5
        } == {}
        for ink, ground in (("good", "good-wash"), ("bad", "bad-wash"), ("plain", "plain-wash"), ("soft", "page")):
            assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
    for name in ("style.css", "traces.css"):
        assert "@media screen and (prefers-color-scheme: dark)" in template_text(name), "pale letters are lost on paper"


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours #rrggbb."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_names_that_read_leftwards_leave_numbers_and_signs_in_their_place() -> None:
    """Without it "8.9% of one, 14.4% of the other" shows 14.4 before the first name, and b - a is drawn as a - b."""
    patterns = {"أساس": ["0"] * 9, "توجيه": ["1"] * 9}
    report = dataclasses.replace(
        many_arms(2),
        comparison=compare_arms(table(patterns), baseline="أساس"),
        problems={
            name: [ProblemOutcome(problem_id=f"p{i}", accuracy=1, total_tokens=40) for i in range(9)]
            for name in patterns
        },
        lengths={},
    )
    page = render_html(dataclasses.replace(report, headline=["توجيه: cut 8.9%, 14.4% of أساس الف<b>"]))
    assert "<p><bdi>توجيه</bdi>: cut 8.9%, 14.4% of <bdi>أساس الف</bdi>&lt;b&gt;</p>" in page
    assert "<td><bdi>توجيه</bdi> − <bdi>أساس</bdi></td>" in page
    assert "توجيه&#8206; − &#8206;أساس" in (charts.difference_forest(report) or "")
