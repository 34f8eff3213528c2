"""The playground in a headless browser: started, steered, slid, coloured, saved, reloaded, by mouse, by keyboard, on a phone; text stays text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import find_browser
from launch.playground import boards
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.direction import Direction
from playground_page import serving

api = pytest.importorskip(
    "playwright.sync_api", reason="no driver of browsers is installed: pip install 'moe-steer[browser]'"
)
pytestmark = [pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"), pytest.mark.slow]
DESKTOP, PHONE = (1280, 900), (390, 844)
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e</span>"
TOKENS = ".column:nth-child({}) .tokens span"
# A short run begins and ends between two looks at the page: the page itself counts how many began.
COUNT_RUNS = """
window.begun = 0;
new MutationObserver((seen) => { begun += seen.some((one) => one.target.getAttribute("aria-busy") === "true"); })
  .observe(document, {subtree: true, attributeFilter: ["aria-busy"]});
"""
OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("playground")
    SteeringPlan(experts=[ExpertGain(1, 12, 3.0)], scope="thought").save(home / "mine.json")
    Direction(vector_D=torch.ones(128), layer=2, method="test", header={"residual_norm": 4.0}).save(
        home / "way.safetensors"
    )
    files: dict[str, Any] = {"plan": (str(home / "mine.json"),), "direction": (str(home / "way.safetensors"),)}
    with serving(out=str(home / "out"), **files) as address:
        yield address


@pytest.fixture(scope="module")
def open_page(address: str) -> Iterator[OpenPage]:
    """Opens a page of its own. Whatever a page's console says, and what it asks of others, fails at the end."""
    said: list[str] = []

    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )

        def open_page(name: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            context.add_init_script(COUNT_RUNS)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda asked: None if asked.url.startswith(address) else said.append(asked.url))
            page.goto(f"{address}?page={name}")
            settled(page)
            return page

        yield open_page
        browser.close()
    # Chrome itself notes each answer of 400: they are the sentences that a test asks for.
    assert [line for line in said if "400 (Bad Request)" not in line] == []


def settled(page: Any) -> None:
    page.wait_for_selector("#playground[aria-busy=false]")


def run(page: Any, press: Callable[[], None] | None = None) -> None:
    """Press Run, and wait for the end."""
    before = page.evaluate("begun")
    (press or (lambda: page.click("#run")))()
    page.wait_for_function("before => begun > before", arg=before)
    settled(page)
    assert page.inner_text("#said") == ""


def words(page: Any, column: int) -> str:
    return "".join(page.locator(TOKENS.format(column)).all_text_contents())


def colours(page: Any, column: int) -> list[str]:
    found: list[str] = page.locator(TOKENS.format(column)).evaluate_all("all => all.map((one) => one.style.background)")
    return found


def pick(page: Any, place: str, value: str) -> None:
    """Choose a colour, and wait for it."""
    page.select_option(place, value)
    settled(page)


def test_start_steer_slide_colour_save_and_reload(open_page: OpenPage) -> None:
    page = open_page("the-whole-way")
    page.select_option(".column:nth-child(2) .what", "plan:yours")
    begun = time.monotonic()
    page.click("#run")
    page.wait_for_selector(TOKENS.format(2))
    print(f"first steered token {time.monotonic() - begun:.2f} s after the click")
    settled(page)
    assert "correct" in page.inner_text(".column:nth-child(1) .result")
    plain, gentle = words(page, 1), words(page, 2)
    assert plain.startswith("Okay.")
    assert page.locator(".column:nth-child(1) .block h3").all_text_contents()[0].startswith("Thought")

    slider = page.locator(".expert .slider")
    slider.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    gain = float(page.input_value(".expert .gain"))
    assert gain == 64, "a slider goes by powers of two"
    assert page.is_visible("#stale")
    run(page)
    assert words(page, 1) == plain, "the same seed, the same tokens"
    assert words(page, 2) != gentle
    assert not page.is_visible("#stale")
    acted = [bool(colour) for colour in colours(page, 2)]
    assert any(acted)
    assert not any(colours(page, 1)), "nothing acts in the plain column"
    pick(page, "#colour", "expert")
    assert [bool(colour) for colour in colours(page, 2)] == acted
    assert "weight" in page.inner_text("#legend")
    for other in ("entropy", "projection"):
        pick(page, "#colour", other)
        assert any(colours(page, 1))

    page.hover(TOKENS.format(1) + ":nth-child(3)")
    assert "token 3 of column 1" in page.inner_text("#token")
    experts = page.locator("#token-experts li")
    assert experts.count() == 6
    experts.nth(0).get_by_text("+ plan").click()
    assert page.locator(".expert").count() == 2
    page.click(".column:nth-child(2) .save")
    page.wait_for_selector(".column:nth-child(2) .saved:not([hidden])")
    command = page.inner_text(".column:nth-child(2) .command").split()
    saved = json.loads(Path(command[command.index("--plan") + 1]).read_text())
    assert [entry["gain"] for entry in saved["experts"]] == [64, 4]

    page.wait_for_timeout(400)  # the last change is kept a moment after it was made
    before = [
        words(page, 1),
        words(page, 2),
        colours(page, 1),
        page.input_value(".expert .gain"),
        page.input_value("#colour"),
    ]
    assert page.is_visible("#stale")
    page.reload()
    settled(page)
    page.wait_for_selector(".tokens span.on")
    after = [
        words(page, 1),
        words(page, 2),
        colours(page, 1),
        page.input_value(".expert .gain"),
        page.input_value("#colour"),
    ]
    assert after == before
    assert page.is_visible("#stale")


def test_a_gate_is_chosen_acts_and_is_kept(open_page: OpenPage) -> None:
    page = open_page("with-a-gate")
    page.select_option(".column:nth-child(2) .what", "plan:yours")
    page.fill(".expert .gain", "64")
    page.locator(".expert .gain").blur()
    assert not page.is_visible("#gate-border")
    page.select_option("#gate", "spent")
    assert page.inner_text("#gate-words") == "tokens of thought, from"
    page.fill("#gate-border", "12")
    page.locator("#gate-border").blur()
    run(page)
    acted = [bool(colour) for colour in colours(page, 2)]
    assert not any(acted[:12])
    assert any(acted[12:])
    assert words(page, 2) != words(page, 1)
    page.click(".column:nth-child(2) .save")
    page.wait_for_selector(".column:nth-child(2) .saved:not([hidden])")
    command = page.inner_text(".column:nth-child(2) .command").split()
    saved = json.loads(Path(command[command.index("--plan") + 1]).read_text())
    assert saved["version"] == 2
    assert saved["experts"][0]["when"] == {"on": "spent", "above": 12}
    page.click("#add-expert")
    page.fill("#gate-border", "-1")
    page.locator("#gate-border").blur()
    page.click("#run")
    page.wait_for_selector("#said:not(:empty)")
    assert "never below 0" in page.inner_text("#said")
    page.select_option("#gate", "margin")
    page.wait_for_timeout(400)
    page.reload()
    settled(page)
    assert (page.input_value("#gate"), page.input_value("#gate-border")) == ("margin", "0.2")
    page.select_option("#gate", "")
    assert not page.is_visible("#gate-border")


def test_columns_of_every_kind_and_a_refusal_in_a_sentence(open_page: OpenPage) -> None:
    page = open_page("every-kind")
    page.click("#add-column")
    page.click("#add-column")
    assert page.is_disabled("#add-column")
    for number, kind in enumerate(("plan:mine", "direction:way", "arm"), 2):
        page.select_option(f".column:nth-child({number}) .what", kind)
    page.fill(".column:nth-child(4) .word", "budget:9")
    page.fill(".column:nth-child(2) .value", "-9")
    page.locator(".column:nth-child(2) .value").blur()
    page.click("#run")
    page.wait_for_selector("#said.wrong")
    assert page.inner_text("#said").startswith("column 2: dose -9 makes the gain 3 of layer 1 expert 12 -17")
    page.fill(".column:nth-child(2) .value", "2")
    page.locator(".column:nth-child(2) .value").blur()
    run(page)
    assert page.locator(".column").count() == 4
    assert page.inner_text(".column:nth-child(4) .block h3").startswith("Thought · 8 tokens"), (
        "the budget counts the line end of the prompt"
    )
    last = words(page, 4)
    page.click(".column:nth-child(3) .remove")
    settled(page)
    page.wait_for_selector(TOKENS.format(3))
    assert words(page, 3) == last, "an answer stays with its column"


def test_by_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page("by-keyboard")

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no Tab reaches {selector}")

    tab_to("#problem")
    page.keyboard.press("ArrowUp")
    tab_to("#run")
    run(page, lambda: page.keyboard.press("Enter"))
    tab_to(".tokens span")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.at") == "1"
    assert "token 2 of column 1" in page.inner_text("#token")
    page.keyboard.press("End")
    assert "never processed" in page.inner_text("#token")
    page.keyboard.press("Tab")
    tab_to(".column:nth-child(2) .tokens span")
    page.keyboard.press("n")
    assert "the plan acted here" in page.inner_text("#token")
    place = page.evaluate("document.activeElement.dataset.at")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#token-experts') !== null")
    page.keyboard.press("Enter")
    assert page.input_value("#colour") == "expert"
    settled(page)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.at") == place
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:not([hidden])")
    page.reload()  # in the middle of a run
    page.wait_for_selector(TOKENS.format(1))
    tab_to("#stop")
    page.keyboard.press("Enter")
    settled(page)
    assert "stopped" in page.inner_text(".column:nth-child(1) .result")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: OpenPage, scheme: str) -> None:
    page = open_page(f"on-a-phone-{scheme}", PHONE, scheme)
    run(page)
    page.click(".column:nth-child(2) .save")
    page.wait_for_selector(".column:nth-child(2) .saved:not([hidden])")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5
             && !one.closest("#token-experts, pre") && !one.matches(".unseen, .switch input")).map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    # Text on the strongest colour keeps the contrast that readers need (WCAG: 4.5).
    assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => { const v = c[i] / 255; return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const token = [...document.querySelectorAll(".tokens span:not(.edge)")].find((one) => one.style.background);
  const ink = rgb(getComputedStyle(token).color), card = rgb(getComputedStyle(token.closest("section")).backgroundColor);
  const [r, g, b, a] = [...rgb(getComputedStyle(token).backgroundColor), 1];
  const ground = [r, g, b].map((value, i) => a * value + (1 - a) * card[i]);
  const [high, low] = [light(ink), light(ground)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
}"""


def test_hostile_prompts_and_answers_are_text(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokens say."""
    read = boards.texts_of
    monkeypatch.setattr(boards, "texts_of", lambda tokenizer, ids: [text + HOSTILE for text in read(tokenizer, ids)])
    page = open_page("hostile-text")
    page.get_by_text("Own words").click()
    page.fill("#text", HOSTILE)
    page.click("#sampling summary")
    page.fill("#most", "5")
    page.locator("#most").blur()
    run(page)
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert words(page, 1).count(shown) == 5
    page.hover(TOKENS.format(1))
    assert "<img src=x" in page.inner_text("#token")
    page.reload()
    settled(page)
    assert page.input_value("#text") == HOSTILE
    assert page.title() == "moe-steer playground"
    assert page.locator("#playground img, #playground script").count() == 0
