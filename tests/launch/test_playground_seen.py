"""What the page says, in a headless browser: of fields that hold no number, of a plan without an effect, of a server that has gone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from browser import find_browser
from launch.playground import readings
from launch.playground.playground import Playground
from playground_page import listening
from test_playground_browser import OpenPage, address, open_page, run, settled

__all__ = ["address", "open_page"]
pytestmark = [pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"), pytest.mark.slow]
EFFECT = ".column:nth-child({}) .effect"


def write(page: Any, place: str, value: str) -> None:
    page.fill(place, value)
    page.locator(place).blur()


@pytest.mark.parametrize(
    ("place", "value", "said", "usual"),
    [
        (".expert .gain", "", "gain of layer 2 expert 0 is None", "4"),
        (".expert .number", "", "give a whole number", "0"),
        (".expert .number", "1.7", "is 1.7: give a whole number", "0"),
        (".column:nth-child(2) .value", "", "'dose' is None: give a number", "1"),
        ("#seed", "", "'seed' is None: give a whole number", "0"),
        ("#seed", "1.5", "'seed' is 1.5: give a whole number", "0"),
        ("#temperature", "", "'temperature' is None: give a number", "1"),
        ("#top-p", "", "'top_p' is None: give a number", "1"),
        ("#most", "", "'max_new_tokens' is None: give a whole number", "30"),
        ("#most", "2.5", "'max_new_tokens' is 2.5: give a whole number", "30"),
    ],
)
def test_a_field_without_a_number_is_refused_and_not_rounded(
    open_page: OpenPage, place: str, value: str, said: str, usual: str
) -> None:
    page = open_page("fields")
    page.click("#sampling summary")
    page.select_option(".column:nth-child(2) .what", "plan:yours")
    write(page, place, value)
    page.click("#run")
    page.wait_for_selector("#said.wrong")
    assert said in page.inner_text("#said")
    write(page, place, usual)
    run(page)
    page.context.close()


def test_columns_say_where_the_plan_acted_and_whether_anything_changed(open_page: OpenPage) -> None:
    page = open_page("effects")
    page.select_option(".column:nth-child(2) .what", "plan:yours")
    write(page, ".expert .gain", "1.0001")
    run(page)
    assert page.inner_text(EFFECT.format(1)) == ""
    assert " · the same text as column 1" in page.inner_text(EFFECT.format(2))
    assert page.inner_text(EFFECT.format(2)).startswith("acted at ")
    assert page.inner_text("#ended") == "All columns have ended.", "said to those who do not see it"
    write(page, ".expert .gain", "64")
    run(page)
    assert "differs from column 1 from token " in page.inner_text(EFFECT.format(2))
    page.select_option("#gate", "spent")
    write(page, "#gate-border", "5000")
    run(page)
    assert page.inner_text(EFFECT.format(2)) == "acted at none of these tokens · the same text as column 1"
    page.click("#sampling summary")
    write(page, "#most", "1")
    run(page)
    assert "1 token ·" in page.inner_text(".column:nth-child(1) .result")
    assert "the thought never closes" in page.inner_text(".column:nth-child(1) .result")


def test_a_server_that_ends_in_a_run_leaves_no_column_running(
    open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_one = readings.Readings.__call__

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(1.5)  # longer than the last look at the columns takes
        return write_one(self, *given)

    monkeypatch.setattr(readings.Readings, "__call__", slow)
    page = elsewhere(open_page)
    with listening(Playground(port=0, out=str(tmp_path)).open()) as where:
        page.goto(where)
        settled(page)
        page.click("#run")
        page.wait_for_selector(".column.running .tokens span")
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(300)
        assert page.inner_text("#said") == "", "Run is off while a run goes on, by key too"
    settled(page)
    assert page.locator(".column.running").count() == 0
    assert page.inner_text(".column:nth-child(1) .state") == "broken off"
    page.click("#run")
    page.wait_for_selector("#said.wrong")
    assert "the playground does not answer" in page.inner_text("#said")


def test_a_page_that_cannot_begin_says_so_and_offers_nothing(open_page: OpenPage, address: str) -> None:
    page = elsewhere(open_page)
    page.goto(f"{address}?page=a%20b")
    page.wait_for_selector("#said.wrong")
    assert "is not one of this playground: open the address without it" in page.inner_text("#said")
    assert page.inner_text("#about") == "not loaded"
    assert page.is_disabled("#run")


def elsewhere(open_page: OpenPage) -> Any:
    """A page whose console may complain of a server that is not there."""
    return open_page("anywhere").context.browser.new_page()
