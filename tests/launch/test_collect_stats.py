"""Traces to statistics in one go: the same counts in parts, on two ranks, and after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expert_stats import ExpertScores, RoutingCounts
from launch.cli.main import main as command_line
from launch.collect_stats import main
from launch.core import wiring
from launch.jobs import stats
from rank_processes import ROOT, run_ranks


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 unsteered answers."""
    folder = tmp_path_factory.mktemp("traces") / "plain"
    assert command_line(["generate", "--num", "24", "--max-new-tokens", "120", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their statistics, in one part."""
    folder = tmp_path_factory.mktemp("stats") / "whole"
    assert main(["--traces", str(traces), "--out", str(folder)]) == 0
    return folder


def test_the_folder_holds_counts_scores_and_pictures(
    traces: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {"run.json", "counts.safetensors", "scores.json", "heatmap.svg", "stability.svg"}
    step_by_step = tmp_path / "counts.safetensors"
    assert command_line(["collect", "--traces", str(traces), "--out", str(step_by_step)]) == 0
    counts = RoutingCounts.load(whole / "counts.safetensors")
    assert counts == RoutingCounts.load(step_by_step)
    assert counts.num_traces == 24
    scored = ["score", "--counts", str(step_by_step), "--missing-marker", "skip", "--out", str(tmp_path / "s.json")]
    capsys.readouterr()
    assert command_line(scored) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if "next: moe-steer " in line]
    words = hint.partition("next: moe-steer ")[2].replace("plan.json", str(tmp_path / "plan.json")).split()
    assert command_line(words) == 0, "what is named as the next command is not refused"
    assert "--unproven" in words, "the lab's experts lack evidence"
    mine, theirs = (ExpertScores.load(file).ranking() for file in (whole / "scores.json", tmp_path / "s.json"))
    assert repr(mine) == repr(theirs), "as text: what is not known is NaN, which equals nothing"
    assert (whole / "heatmap.svg").read_text().startswith("<svg")


def test_interrupted_it_goes_on_with_the_missing_parts(
    traces: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats"
    command = ["--traces", str(traces), "--part", "7", "--out", str(out)]
    real, counted = wiring.collect_over_ranks, []

    def until_the_third(model: Any, some: Any, *rest: Any, **named: Any) -> RoutingCounts:
        if len(counted) == 2:
            raise RuntimeError("the power went")
        counted.append(len(some))
        return real(model, some, *rest, **named)

    monkeypatch.setattr(stats, "collect_over_ranks", until_the_third)
    assert main(command) == 1
    assert "the power went" in capsys.readouterr().err
    assert not (out / "counts.safetensors").exists()
    assert len(list((out / "parts").iterdir())) == 2
    counted.clear()
    assert main(command) == 0
    assert counted == [7, 3], "two parts were there already"
    assert "in parts of 7: 4, 2 of them counted before" in capsys.readouterr().out
    assert RoutingCounts.load(out / "counts.safetensors") == RoutingCounts.load(whole / "counts.safetensors")
    assert not (out / "parts").exists()


def test_finished_it_counts_nothing_twice_and_may_score_anew(
    traces: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stats, "collect_over_ranks", lambda *_, **__: pytest.fail("nothing is left to count"))
    command = ["--traces", str(traces), "--out", str(whole)]
    assert main([*command, "--coefficients", "<think>=1", "</think>=0", "Alternatively=0"]) == 0
    assert ExpertScores.load(whole / "scores.json").coefficients == (1.0, 0.0, 0.0, 0.0)
    assert main(command) == 0
    assert main([*command, "--base", "all"]) == 1
    assert "holds a run of another config" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_count_the_same(traces: Path, whole: Path, tmp_path: Path) -> None:
    command = ["--traces", str(traces), "--part", "16", "--out", str(tmp_path / "two")]
    done = run_ranks(ROOT / "launch" / "collect_stats.py", 2, command, 180)
    assert done.codes == [0, 0], done.text[-3000:]
    assert done.text.count("next: moe-steer plan") == 1, "only rank 0 talks"
    for name in ("counts.safetensors", "scores.json"):
        assert (tmp_path / "two" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "lab-dense"], 1, "lab-dense is a dense model and has no experts to count: contrast"),
        (["--coefficients", "Hmm=-1"], 2, "the coefficient of 'Hmm' belongs to no marker: add it to --markers"),
        (["--zero-joint", "none"], 2, "zero_joint is 'none': choose one of minus_one, half, skip"),
        (["--coefficients", "<think>=0"], 2, "no marker has a coefficient above 0"),
        (
            ["--markers", "Zebra"],
            2,
            "no marker has a coefficient above 0 ({'Zebra': 0.0}): give one with --coefficients",
        ),
        (["--base", "some"], 2, "base is 'some': choose one of generated, all"),
        (["--position", "after"], 2, "position is 'after': choose one of input, predicted"),
        (["--part", "0"], 2, "part is 0: give a whole number >= 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    options: list[str], code: int, message: str, traces: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--traces", str(traces), "--out", str(tmp_path / "stats"), *options]
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
    else:
        assert main(command) == code
    shown = " ".join(
        "".join(capfd.readouterr()).replace("│", " ").split()
    )  # an error of the options is framed and wrapped
    assert message in shown
    assert not (tmp_path / "stats").exists()


def test_no_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--traces", "none.jsonl", "--out", str(tmp_path / "stats")]) == 1
    assert "no traces at 'none.jsonl'" in capsys.readouterr().err


def test_it_also_goes_by_a_name_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("collect-stats", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            command_line([name, "--help"])
        assert stopped.value.code == 0
        assert f"moe-steer {name}" in capsys.readouterr().out
    assert command_line(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  collect-stats " in shown
    assert "\n  evaluate " in shown
