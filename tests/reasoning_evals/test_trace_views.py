"""Traces to look at: the file, the table, and the page, in a real browser where there is one."""

from __future__ import annotations

import colorsys
import dataclasses
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reasoning_evals.report import TRACES_PAGE, VIEWS_FILE, TraceView, TraceViews
from reasoning_evals.report.page import template_text
from reasoning_evals.report.trace_views import render_views
from test_report_tables import contrast

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u202e\u0007", "&amp;", "\u2028'\"`"]


def trace(name: str = "p1, sample 0", arm: str = "baseline", **changes: object) -> TraceView:
    made = TraceView(
        name=name,
        arm=arm,
        outcome="correct",
        tokens=["What", " is", " 2", "<think>", " four", ".", "</think>", " 4", *HOSTILE],
        prompt_length=4,
        thought=(4, 6),
        marks={"<think>": [3], "step end": [5], "steered": [4, 7]},
        fired={
            "layer 1 expert 2": {"at": [3, 4, 7], "weight": [0.5, 1.0, 0.25]},
            "layer 3 expert 0": {"at": [4], "weight": [0.5]},
        },
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def views(*traces: TraceView) -> TraceViews:
    return TraceViews(
        title="lab <b>run</b>",
        experts={"layer 1 expert 2": "plan", "layer 3 expert 0": "rank 1"},
        traces=list(traces) or [trace(), trace("p1, sample 1", "steered", fired={})],
    )


def test_tokens_can_be_read_on_the_strongest_colour_of_every_expert() -> None:
    """4.5 to 1, by day and by night, also in the prompt, whose letters are soft only where nothing is coloured."""
    style, script = template_text("traces.css"), template_text("traces.js")
    assert "#text span.prompt:not(.fires) { color: var(--soft); }" in style
    hues = json.loads(re.search(r"HUES = (\[.*?\])", script)[1])  # type: ignore[index]
    least, more = map(float, re.search(r"\(([\d.]+) \+ ([\d.]+) \* share\)", script).groups())  # type: ignore[union-attr]
    schemes = re.findall(r":root \{(.*?)\}", style)
    assert len(schemes) == 2
    for scheme in schemes:
        ink, soft, paper = (re.search(rf"--{name}: (#\w+)", scheme)[1] for name in ("ink", "soft", "paper"))  # type: ignore[index]
        paper = "#ffffff" if paper == "#fff" else paper
        assert contrast(soft, paper) >= 4.5
        for hue in hues:
            lightness = float(re.search(r"--band: (\d+)%", scheme)[1]) / 100  # type: ignore[index]
            colour = colorsys.hls_to_rgb(hue / 360, lightness, 0.8)
            under = [int(paper[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            mixed = [(least + more) * a + (1 - least - more) * b for a, b in zip(colour, under, strict=True)]
            assert contrast("#" + "".join(f"{round(255 * part):02x}" for part in mixed), ink) >= 4.5, hue


def test_the_file_gives_the_views_back(tmp_path: Path) -> None:
    made = views()
    made.save(tmp_path)
    assert TraceViews.load(tmp_path) == made
    assert (tmp_path / TRACES_PAGE).read_text() == render_views(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("traces"), "holds no traces to look at"),
        (lambda r: r.update(version=2), "another version"),
        (lambda r: r["traces"][0].update(tokens="text"), "'tokens' is 'text'"),
        (lambda r: r["traces"][0].update(more=1), "more"),
        (lambda r: r["traces"][0]["marks"].update(x=[99]), "marks a token that it has not"),
        (lambda r: r["traces"][0]["fired"]["layer 1 expert 2"].update(at=[-1, 0, 1]), "a token that it has not"),
        (lambda r: r["traces"][0]["fired"]["layer 1 expert 2"].update(weight=[]), "tokens without a weight"),
        (lambda r: r["traces"].append(3), "holds no traces"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, change: object, message: str) -> None:
    views().save(tmp_path)
    record = json.loads((tmp_path / VIEWS_FILE).read_text())
    change(record)  # type: ignore[operator]
    (tmp_path / VIEWS_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as caught:
        TraceViews.load(tmp_path)
    assert "--again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_adds_up_the_traces_of_an_arm() -> None:
    made = views(trace(), trace("p2, sample 0"))
    head, *rows = made.table().splitlines()
    assert head.split()[:3] == ["arm", "traces", "expert"]
    assert re.split(r"  +", rows[0])[2:] == [
        "layer 1 expert 2", "plan", "6", "2", "2", "2", "0.583", "<think> 2/2, step end 0/2, steered 4/4",
    ]  # fmt: skip
    assert len(made.table(each=True).splitlines()) == 5
    assert "p2, sample 0" in made.table(each=True)


def test_texts_cannot_leave_the_data() -> None:
    page = render_views(views())
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page
    assert "<b>run</b>" not in page


def test_two_hundred_long_traces_are_below_20_mb() -> None:
    """At the routing of a large model: 24 of 256 experts a layer recorded, 8 of them selected a token."""
    rng = random.Random(0)
    names = [f"layer {layer} expert {200 + layer}" for layer in range(24)]
    words = [" the", " energy", "=", "3.14", " therefore", "\\frac", " so", "\n"]
    one = dataclasses.replace(
        trace(),
        tokens=[rng.choice(words) for _ in range(2000)],
        marks={"step end": list(range(0, 2000, 20)), "steered": list(range(2000))},
        fired={
            name: {"at": (at := sorted(rng.sample(range(2000), 63))), "weight": [round(rng.random(), 4) for _ in at]}
            for name in names
        },
    )
    many = TraceViews(title="x", experts=dict.fromkeys(names, "plan"), traces=[one] * 200)
    assert len(render_views(many).encode()) < 20_000_000


def in_browser(page: str, folder: Path, script: str = "") -> str:
    """The page's text after its script, and after ``script``, which its policy is widened for."""
    if script:
        page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    shown = in_browser(render_views(views()), tmp_path)
    spans = re.findall(r'<span data-at="(\d+)"([^>]*)>', shown)
    classes = {int(at): set(re.findall(r"[\w-]+", rest.partition("style")[0])) for at, rest in spans}
    assert len(classes) == 13
    assert {at for at, found in classes.items() if "fires" in found} == {3, 4, 7}
    assert {at for at, found in classes.items() if "prompt" in found} == {0, 1, 2, 3}
    assert {at for at, found in classes.items() if "thought" in found} == {4, 5}
    assert "mark" in classes[5]
    assert {at for at, found in classes.items() if "steered" in found} == {4, 7}
    assert "\\u202e\\u0007" in shown, "what no eye sees is shown as its code"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_keys_move_and_choose(tmp_path: Path) -> None:
    script = """
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      const token = () => document.getElementById("token").textContent;
      const log = [];
      press("n"); log.push(token()); press("n"); log.push(token()); press("p"); log.push(token());
      press("1"); press("2"); log.push([...document.querySelectorAll(".fires")].map((s) => s.dataset.at).join());
      press("j"); log.push(document.getElementById("trace").value);
      document.querySelector('[data-at="5"]').dispatchEvent(new MouseEvent("mouseover", {bubbles: true})); log.push(token());
      document.title = JSON.stringify(log);
    """
    shown = in_browser(render_views(views()), tmp_path, script)
    title = re.search(r"<title>(.*?)</title>", shown, re.DOTALL)
    assert title is not None
    log = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert log[0].startswith('Token 3 "<think>": layer 1 expert 2 (plan): 0.500. Marked: <think>.')
    assert log[1].startswith('Token 4 " four": layer 1 expert 2 (plan): 1.000; layer 3 expert 0 (rank 1): 0.500.')
    assert log[2].startswith("Token 3")
    assert log[3] == "4", "expert 1 switched off, expert 2 on"
    assert log[4] == "1"
    assert log[5].startswith('Token 5 ".": none of the recorded experts. Marked: step end.')


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_no_other_script_runs(tmp_path: Path) -> None:
    page = render_views(views()).replace("</body>", "<script>document.title = 'ran'</script></body>")
    assert "<title>ran</title>" not in in_browser(page, tmp_path)
