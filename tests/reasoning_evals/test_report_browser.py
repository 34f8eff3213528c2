"""The report in a headless browser: all parts are there, drawn, unfolded at a click, inside the window; nothing runs or loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from browser import find_browser, measure
from reasoning_evals.report import Report, build_report, render_html
from reasoning_evals.runs.run import Arm
from scripted_sampler import ScriptedSampler, arms, problems
from test_report import HOSTILE, SVG, HostileSampler, make_run

pytestmark = [
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"),
    pytest.mark.slow,
]
DESKTOP, PHONE = WIDTHS = (1280, 390)
UNBROKEN = "thisproblemhasanamewithoutanyplacetobreakitintolines" * 4
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A report, and what the browser measured of its page."""

    report: Report
    pages: dict[int, dict[str, Any]]
    console: list[str]


WHOLE = HOSTILE.replace("\ud800", "")  # a prompt is valid Unicode; an answer may hold anything


def look(report: Report, folder: Path, html: str | None = None) -> Seen:
    page = folder / "report.html"
    page.write_text(html or render_html(report), encoding="utf-8")
    measured, console = measure(page, WIDTHS, folder)
    assert [page["width"] for page in measured] == list(WIDTHS)
    return Seen(report, {page["width"]: page for page in measured}, console)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("usual")
    given = problems(40)
    given[3] = dataclasses.replace(
        given[3], problem_id=UNBROKEN, domain="a domain with a name of many words, as some have"
    )
    given[5] = dataclasses.replace(given[5], domain=UNBROKEN)
    tested = [*arms(), *(Arm(f"placebo {i}", ScriptedSampler(0.5 + i / 50, shift=i)) for i in range(3))]
    make_run(folder, tested, given)
    report = build_report(
        folder, figures={"Heat map": SVG}, facts={"Model": "script", "Plan": UNBROKEN}, max_examples=4
    )
    return look(report, folder)


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("hostile")
    given = [
        dataclasses.replace(one, prompt=WHOLE + one.prompt, domain=WHOLE * (i % 2)) for i, one in enumerate(problems(8))
    ]
    make_run(
        folder, [Arm("baseline", HostileSampler(0.4)), Arm("steered<script>", HostileSampler(0.8, shift=1))], given
    )
    rows = {"steered<script>": [{"kind": "<script>", "tokens": 3}]}
    return build_report(folder, title=HOSTILE, figures={HOSTILE: SVG + HOSTILE}, audit=rows, facts={HOSTILE: HOSTILE})


@pytest.fixture(scope="module")
def hostile(hostile_report: Report, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return look(hostile_report, tmp_path_factory.mktemp("page"))


def area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["usual", "hostile"])
def test_nothing_is_wider_than_the_window(which: str, width: int, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(which).pages[width]
    assert page["wide"] == []
    assert page["scroll_width"] <= width


def test_a_desktop_shows_whole_tables_and_drawings(usual: Seen) -> None:
    # Five arms with their intervals by domain are wider than a desktop, and scroll.
    assert set(usual.pages[DESKTOP]["scrolled"]) <= {"Accuracy by domain"}
    assert "Paired differences" in usual.pages[PHONE]["scrolled"], "on a phone they scroll on their own"


@pytest.mark.parametrize("width", WIDTHS)
def test_every_section_is_there_in_order(usual: Seen, width: int) -> None:
    headings = usual.pages[width]["headings"]
    expected = [
        "Arms",
        "Paired differences",
        "Accuracy against thinking",
        "Length of thoughts",
        "Change of each problem",
    ]
    expected += ["Accuracy by domain", "Heat map", "What fired", "Gained: solved more often by steered"]
    expected += ["Lost: solved less often by steered", "Config and versions"]
    assert [name for name, _ in headings][1:] == expected
    assert all(area(box) > 0 for _, box in headings)
    tops = [box[1] for _, box in headings]
    assert tops == sorted(tops)


@pytest.mark.parametrize("width", WIDTHS)
def test_drawings_are_visible_and_their_letters_apart(usual: Seen, width: int) -> None:
    page = usual.pages[width]
    drawings = page["drawings"]
    assert len(drawings) == 5 + len(usual.report.comparison.arms)
    assert all(one["marks"] >= 3 and area(one["box"]) > 1500 for one in drawings)
    shown = [one for one in page["drawings_before"] if not one["folded"]]
    assert all(area(one["box"]) > 1500 for one in shown), "visible without a click"
    assert [one["label"] for one in page["drawings_before"] if one["folded"]] == [
        "Accuracy of changed problems before and after"
    ]
    assert page["overlaps"] == []
    assert page["ink"]
    assert len(set(page["ink"])) >= len(usual.report.comparison.arms)
    assert "none" not in page["ink"]
    assert all(natural > 0 and area(box) > 0 for _, natural, box in page["images"])
    assert len(page["images"]) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_thoughts_are_folded_and_open_at_a_click(usual: Seen, width: int) -> None:
    page = usual.pages[width]
    sides = [side for example in (*usual.report.gained, *usual.report.lost) for side in (example.a, example.b)]
    assert (
        page["num_folded"] == page["shut"] == sum(bool(side.thought) for side in sides) + 2
    )  # and the dumbbells and the config
    assert all(is_open and area(box) > 0 for is_open, box in page["opened"])


def test_hostile_output_is_text_and_nothing_else(hostile: Seen) -> None:
    for page in hostile.pages.values():
        assert "document.title='taken'" in page["title"]
        assert page["title"] != "taken"
        assert (page["scripts"], page["handlers"]) == (0, 0)
        assert page["requests"] == []
        assert any("<script>document.title='taken'</script>" in text for text in page["pres"])
    assert hostile.console == [], "the policy had nothing to refuse"


def test_hostile_output_is_inert_without_the_pages_policy(hostile_report: Report, tmp_path: Path) -> None:
    """Escaping alone holds; the policy is a second line."""
    html = render_html(hostile_report)
    assert html.count(POLICY) == 1
    seen = look(hostile_report, tmp_path, html.replace(POLICY, ""))
    for page in seen.pages.values():
        assert page["title"] != "taken"
        assert (page["scripts"], page["handlers"], page["requests"]) == (0, 0, [])


def test_nothing_is_loaded_and_nothing_complains(usual: Seen) -> None:
    assert usual.console == []
    assert all(page["requests"] == [] and page["scripts"] == 0 for page in usual.pages.values())


def test_the_probe_sees_what_is_wrong(tmp_path: Path, usual: Seen) -> None:
    """A page with each fault: a wide box, a script, a request, letters on letters."""
    wrong = (
        '<div style="width:2000px">wide</div><script>document.title="taken"; console.error("broken")</script>'
        '<img src="missing.png" onerror="1"><svg aria-label="x" width="200" height="40"><text y="20">one</text><text y="20">two</text></svg>'
    )
    seen = look(usual.report, tmp_path, f"<!doctype html><body>{wrong}</body>")
    page = seen.pages[PHONE]
    assert page["scroll_width"] > PHONE
    assert "div" in page["wide"]
    assert (page["title"], page["scripts"], page["handlers"]) == ("taken", 1, 1)
    assert page["requests"] == ["missing.png"]
    assert page["overlaps"] == ["one over two"]
    assert any("broken" in line for line in seen.console)


def test_on_paper_tables_fit_and_letters_are_dark_at_night_too(usual: Seen, tmp_path: Path) -> None:
    """A4 with margins of 12 mm: 703 pixels. Pale letters of the dark scheme were lost on it, and the verdicts cut off."""
    api = pytest.importorskip("playwright.sync_api", reason="no driver of browsers is installed")
    page_file = tmp_path / "report.html"
    page_file.write_text(render_html(usual.report), encoding="utf-8")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 703, "height": 1000}, color_scheme="dark")
        page.goto(page_file.as_uri())
        page.emulate_media(media="print", color_scheme="dark")
        wide = page.evaluate(
            "[...document.querySelectorAll('table')].filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.ariaLabel)"
        )
        ink = page.evaluate("getComputedStyle(document.body).color")
        browser.close()
    assert set(wide) <= {"Accuracy by domain"}, "five arms with their intervals"
    assert ink == "rgb(28, 31, 35)"
