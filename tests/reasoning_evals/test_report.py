"""Run as a program, this file writes the golden reports anew."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reasoning_evals.comparing.compare import Tuning, compare_arms
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.problems import Problem
from reasoning_evals.report import Report, build_report, render_html, render_markdown
from reasoning_evals.report.svg import Scale, padded, ticks
from reasoning_evals.runs.run import Arm, grade_run, run_arms
from scripted_sampler import ScriptedSampler, arms, problems

GOLDEN = Path(__file__).parent / "golden"
SVG = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="4" height="4"/></svg>'
)
HOSTILE = (
    "</pre></details></div><script>document.title='taken'</script><img src=http://evil.example/x onerror=alert(1)>"
    "<svg onload=alert(1)>{{ 7 * 7 }}{% raw %}&lt;b&gt;```\n~~~\n# heading\n| a | b |\x00\x07\u202egnp.exe\ud800<!-- <style>"
)


class HostileSampler(ScriptedSampler):
    """Writes markup wherever it can."""

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for sample in super().sample(requests, config):
            yield dataclasses.replace(
                sample, text=f"{HOSTILE}{sample.text.replace('boxed{-1', 'boxed{-1' + HOSTILE)}{HOSTILE}"
            )


class Page(HTMLParser):
    """Tags, attributes and text, with a check that tags close in order."""

    VOID = ("meta", "img", "br", "circle_", "link")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "unclosed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_run(folder: Path, tested: Sequence[Arm], given: Sequence[Problem]) -> None:
    run_arms(tested, given, folder, 3, SamplingConfig(batch_size=8), seed=5, task="demo")
    grade_run(folder)


def small_report(folder: Path) -> Report:
    """A report whose every byte is decided by the code: what run.json says of time and machine is left out."""
    make_run(folder, arms(), problems(10))
    report = build_report(
        folder,
        title="Demo & more",
        figures={"Heat <map>": SVG},
        facts={"Model": "script", "Plan": "layer 1 expert 2 x64"},
        max_examples=2,
    )
    return dataclasses.replace(report, run={"config": {"seed": 5}})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return small_report(tmp_path_factory.mktemp("run"))


def test_markdown_is_the_golden_one(report: Report) -> None:
    assert render_markdown(report) == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_html_is_the_golden_one(report: Report) -> None:
    """The style is left out of the golden file: it is read in the browser, not in a diff."""
    assert _without_style(render_html(report)) == (GOLDEN / "report.html").read_text(encoding="utf-8")


def _without_style(html: str) -> str:
    return re.sub(r"<style>.*?</style>", "<style></style>", html, flags=re.DOTALL)


def test_page_shows_every_part(report: Report) -> None:
    page = Page(render_html(report))
    pair = report.comparison.pairs[0]
    headings = [
        "Arms",
        "Paired differences",
        "Accuracy against thinking",
        "Length of thoughts",
        "Change of each problem",
    ]
    headings += ["Accuracy by domain", "Heat <map>", "What fired", "Gained: solved more often by steered"]
    headings += ["Lost: solved less often by steered", "Config and versions"]
    positions = [page.text.find(heading) for heading in headings]
    assert min(positions) > 0
    assert positions == sorted(positions)
    assert pair.sentence in page.text
    assert page.text.index(pair.sentence) < positions[0], "the verdict comes first"
    assert f"The 2 largest changes of {len(pair.gained)} are shown." in page.text
    assert page.tags["svg"] == 5 + len(report.comparison.arms)


def test_notes_on_responses_without_an_answer_stand_above_the_verdict_and_leave_it(report: Report) -> None:
    note = "steered: no thought ever closed <b>"
    noted = dataclasses.replace(report, above=[note])
    sentence = report.comparison.pairs[0].sentence
    text = Page(render_html(noted)).text
    assert 0 <= text.find(note) < text.find(sentence)
    page = render_markdown(noted)
    assert (
        0
        <= page.find("Note: steered: no thought ever closed")
        < page.find("no effect shown" if "no effect" in sentence else "steered against")
    )


def test_page_needs_nothing_else(report: Report) -> None:
    html = render_html(report)
    page = Page(html)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == page.tags["a"] == 0
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href", "action")]
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert len(sources) == 1
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("hostile")
    given = [
        Problem(f"p{i}</td><script>", f"{HOSTILE[:-20]} is {i}? ", str(i), "integer", domain="<b>x") for i in range(8)
    ]
    given[0] = dataclasses.replace(given[0], domain="other")
    make_run(
        folder, [Arm("baseline", HostileSampler(0.4)), Arm("steered<script>", HostileSampler(0.8, shift=1))], given
    )
    rows = {"steered<script>": [{"kind": "<script>", "tokens": 3}]}
    return build_report(folder, title=HOSTILE, figures={HOSTILE: SVG + HOSTILE}, audit=rows, facts={HOSTILE: HOSTILE})


def test_hostile_output_is_inert_in_html(hostile: Report) -> None:
    html = render_html(hostile)
    page = Page(html)  # parses only when nothing broke out of its element
    assert page.tags["script"] == page.tags["link"] == 0
    assert page.tags["style"] == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value and value.startswith("data:") for name, value in page.attributes if name == "src")
    assert "{{ 7 * 7 }}" in page.text
    assert "\x00" not in html
    assert "\u202e" not in html
    html.encode()
    assert hostile.gained
    assert "document.title='taken'" in page.text


def test_hostile_output_cannot_leave_its_fence_in_markdown(hostile: Report) -> None:
    text = render_markdown(hostile)
    text.encode()
    fence = ""
    outside = []
    for line in text.split("\n"):
        mark = re.match(r"(`{3,})(json)?$", line)
        if not fence and mark:
            fence = mark.group(1)
        elif fence and line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    assert not [line for line in outside if "<script" in line or ("onerror" in line and "&lt;" not in line)]
    assert all(line.startswith(("#", "<details><summary>thought", "</details>")) or "<" not in line for line in outside)


def test_report_comes_from_the_folder_alone(tmp_path: Path) -> None:
    make_run(tmp_path, arms(), problems(10))
    first = build_report(tmp_path)
    assert first.audit["steered"][0]["tokens"] == 12
    assert first.run["config"]["k"] == 3
    assert not first.figures
    assert render_html(first) == render_html(build_report(tmp_path))
    for example in (*first.gained, *first.lost):
        assert (example.a.outcome == "correct") != (example.b.outcome == "correct")
        assert (example.b.outcome == "correct") == (example.rate_b > example.rate_a)
    tuned = compare_arms(grade_run(tmp_path), tuned=Tuning(4, "the same problems", num_shared=10))
    assert "its p-values are too small" in render_markdown(build_report(tmp_path, tuned))


def test_ungraded_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder: it has no run.json"):
        build_report(tmp_path)
    run_arms(arms(), problems(3), tmp_path, 1, SamplingConfig(), seed=5)
    with pytest.raises(ValueError, match="grade the run first"):
        build_report(tmp_path)


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    class Wordy(ScriptedSampler):
        def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
            for sample in super().sample(requests, config):
                yield dataclasses.replace(sample, text="y" * 30_000 + sample.text)

    make_run(tmp_path, [Arm("baseline", Wordy(0.3)), Arm("steered", Wordy(0.9, shift=1))], problems(6))
    thought = build_report(tmp_path).gained[0].a.thought
    assert re.search(r"\[\.\.\. cut here, 10,\d\d\d more characters\]$", thought)
    assert len(thought) < 20_100


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("given", [arms()[:1], [*arms(), Arm("placebo", ScriptedSampler(0.5, shift=2))]])
def test_one_arm_three_arms_one_sample_and_unmeasured_thoughts(
    tmp_path: Path, num_samples: int, given: list[Arm]
) -> None:
    for arm in given:
        arm.sampler.describe = lambda: {"engine": "script"}  # type: ignore[method-assign]
    run_arms(given, problems(4), tmp_path, num_samples, SamplingConfig(), seed=5)
    grade_run(tmp_path)
    report = build_report(tmp_path)
    page = Page(render_html(report))
    assert "not measured" in page.text
    assert ("Paired differences" in page.text) == (len(given) > 1)
    assert "nan" not in page.text.lower().replace("unanswer", "")
    assert render_markdown(report)


def test_equal_arms_still_make_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, [Arm("baseline", ScriptedSampler(1.0)), Arm("steered", ScriptedSampler(1.0))], problems(4))
    report = build_report(tmp_path)
    assert report.comparison.pairs[0].accuracy.mean == 0
    assert "Every problem was solved equally often" in Page(render_html(report)).text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 11), (0.61, 0.6101), (1e3, 9e5), (-1e-3, 0)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    steps: Any = {round(b - a, 12) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1


def test_scale_and_padding() -> None:
    assert Scale(0, 10, 100, 200)(2.5) == 125
    low, high = padded(3, 3, least=1)
    assert low < 3 < high


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = small_report(Path(folder))
    (GOLDEN / "report.md").write_text(render_markdown(made), encoding="utf-8")
    (GOLDEN / "report.html").write_text(_without_style(render_html(made)), encoding="utf-8")


def test_examples_say_what_gates_did_in_them(tmp_path: Path) -> None:
    make_run(tmp_path, arms(gated=True), problems(10))
    report = build_report(tmp_path)
    (example, *_) = (*report.gained, *report.lost)
    openings = int(example.problem_id[1:]) + example.b.sample_idx
    said = f"layer 1 expert 2: gate opened {openings} times, open at 3 tokens, acted at 2, weight 0.5 added"
    assert (example.a.gates, example.b.gates) == ("", said)
    assert said in render_markdown(report)
    assert said in Page(render_html(report)).text
