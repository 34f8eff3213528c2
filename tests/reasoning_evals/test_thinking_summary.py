"""Over- and underthinking of a run's arms against a plain recount, and the command that prints them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from scipy import stats

from moe_steer.cli import main
from reasoning_evals import Problem
from reasoning_evals.grading_pass import grade_run
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.run import Arm, run_arms
from reasoning_evals.sampling import Request, Sample, SamplingConfig
from reasoning_evals.thinking_metrics import judge_by_rule
from reasoning_evals.thinking_summary import arm_thinking, thinking_change, thoughts_of_run

PROBLEMS = [Problem(f"p{i}", f"{i} + 1?", str(i + 1), "integer") for i in range(4)]
RIGHT = "Here we add one and so we get the sum = {right}. "
AGAIN = "Wait, let me count it all again: once more = {right}. "
WRONG = "Wait, maybe I was off by ten there: the sum = 99. "
LONG = {  # what each problem's thought says
    "p0": RIGHT + AGAIN,
    "p1": RIGHT + AGAIN + WRONG,
    "p2": WRONG,
    "p3": RIGHT,
}
SHORT = {"p0": RIGHT, "p1": RIGHT + WRONG, "p2": WRONG, "p3": ""}
ANSWERS = {"p0": "{right}", "p1": "99", "p2": "99", "p3": "{right}"}


class Spoken:
    """Says the same of a problem every time."""

    def __init__(self, thoughts: dict[str, str], model: str | None = "lab") -> None:
        self.thoughts, self.model = thoughts, model

    def render(self, question: str) -> RenderedPrompt:
        return RenderedPrompt(f"{question}<think>\n", (1,))

    def describe(self) -> dict[str, Any]:
        return {"engine": "spoken", "model": self.model, "says": sorted(self.thoughts.values())}

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for request in requests:
            name = f"p{request.prompt.split()[0]}"
            text = f"{self.thoughts[name]}</think>\\boxed{{{ANSWERS[name]}}}"
            right = int(name[1:]) + 1
            yield Sample(request.key, (9,) * 5, text.replace("{right}", str(right)), "stop")


def write_run(folder: Path, arms: list[Arm], num: int = 4) -> Path:
    run_arms(arms, PROBLEMS[:num], folder, 1, SamplingConfig(greedy=True), 0, task="demo")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [Arm("baseline", Spoken(LONG)), Arm("short", Spoken(SHORT))])


def words(text: str) -> int:
    return len(text.split())


def interval(values: list[float]) -> tuple[float, float]:
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def test_the_numbers_equal_a_plain_recount(run: Path) -> None:
    thoughts = [item for item in thoughts_of_run(run, grade_run(run), words, judge_by_rule) if item is not None]
    assert [item.problem.problem_id for item in thoughts] == ["p0", "p1", "p2", "p3", "p0", "p1", "p2"]
    right, again, wrong = (words(text) for text in (RIGHT, AGAIN, WRONG))
    arm = arm_thinking("baseline", 4, thoughts[:4], judge_by_rule)
    assert (arm.num_samples, arm.num_thoughts, arm.num_wrong) == (4, 4, 2)
    lengths = [right + again, right + again + wrong, wrong, right]
    assert arm.tokens is not None
    assert arm.tokens.mean == fmean(lengths)
    assert arm.attempts is not None
    assert arm.attempts.mean == fmean([2, 3, 1, 1])
    assert arm.stated is not None
    assert arm.stated.mean == 0.75
    first = [right / lengths[0], right / lengths[1], 0.0, 1.0]
    assert arm.outcome_efficiency is not None
    assert arm.outcome_efficiency.mean == pytest.approx(fmean(first))
    assert (arm.outcome_efficiency.low, arm.outcome_efficiency.high) == pytest.approx(interval(first))
    assert arm.process_efficiency is not None
    new = [right / lengths[0], (right + wrong) / lengths[1], 1.0, 1.0]
    assert arm.process_efficiency.mean == pytest.approx(fmean(new))
    assert arm.underthinking is not None  # of p1, which had it, and p2, which never did
    assert arm.underthinking.mean == pytest.approx(fmean([1 - right / lengths[1], 0.0]))

    change = thinking_change("short", "baseline", thoughts)
    assert change.outcome_efficiency is not None
    differences = [1 - first[0], right / (right + wrong) - first[1], 0.0]  # p3 has no thought in the short arm
    assert change.outcome_efficiency.num_problems == 3
    assert change.outcome_efficiency.mean == pytest.approx(fmean(differences))
    assert (change.outcome_efficiency.low, change.outcome_efficiency.high) == pytest.approx(interval(differences))


def test_samples_of_one_problem_are_one_witness(run: Path) -> None:
    thoughts = [item for item in thoughts_of_run(run, grade_run(run), words, judge_by_rule) if item is not None][:4]
    once = arm_thinking("baseline", 4, thoughts, judge_by_rule).outcome_efficiency
    many = arm_thinking("baseline", 40, thoughts * 10, judge_by_rule).outcome_efficiency
    assert once is not None
    assert many is not None
    assert (many.mean, many.low, many.high) == pytest.approx((once.mean, once.low, once.high))


def test_the_command_prints_a_table_and_writes_all_numbers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["thinking", str(run), "--out", str(tmp_path / "new" / "thinking.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    heads = "arm tokens attempts stated chance outcome efficiency process efficiency underthinking"
    assert said[0].split() == heads.split()
    assert said[1].split()[0] == "baseline"
    assert said[1].split()[2:5] == ["1.75", "75.0%", "0.0%"]
    assert any(line.startswith("short against baseline: outcome efficiency +") for line in said)
    assert "short: 1 of 4 samples have no thought" in said
    values = json.loads((tmp_path / "new" / "thinking.json").read_text())
    assert [arm["arm"] for arm in values["arms"]] == ["baseline", "short"]
    assert values["arms"][0]["stated"]["mean"] == 0.75
    assert values["changes"][0]["outcome_efficiency"]["num_problems"] == 3
    assert set(values["arms"][0]) == {
        "arm", "num_samples", "num_thoughts", "num_wrong", "tokens", "attempts", "stated", "chance", "outcome_efficiency",
        "process_efficiency", "underthinking",
    }  # fmt: skip


def test_other_words_and_another_baseline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thinking", str(run), "--switch-words", "once upon", "--baseline", "short"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[1].split()[2] == "1.00"
    assert "baseline against short: " in said


def test_of_a_job_the_test_step_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "job" / "test", [Arm("baseline", Spoken(LONG))])
    assert main(["thinking", str(tmp_path / "job")]) == 0
    assert "baseline" in capsys.readouterr().out


def test_a_chance_rate_that_spoils_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = " ".join(f"It could be that the sum = {number}." for number in range(1, 5))
    folder = write_run(tmp_path / "run", [Arm("baseline", Spoken(dict.fromkeys(LONG, everything)))])
    assert main(["thinking", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "baseline: 100.0% of the thoughts state the answer to ANOTHER problem: a right one means little here" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "long"], "--baseline long is no arm of {run}: it has baseline, short"),
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
    ],
)
def test_wrong_options(options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thinking", str(run), *options]) == 1
    error = capsys.readouterr().err
    assert message.format(run=run) in error
    assert error.count("\n") == 1


def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path) -> str:
        assert main(["thinking", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "holds no generations: give the folder of a run ('moe-steer generate') or of a job" in refused(tmp_path)
    mute = write_run(tmp_path / "mute", [Arm("baseline", Spoken(dict.fromkeys(LONG, "")))])
    assert "holds no thoughts: nothing stands between <think> and </think> in any answer" in refused(mute)
    nameless = write_run(tmp_path / "nameless", [Arm("baseline", Spoken(LONG, model=None))])
    assert "the run does not name its model: give the one whose tokenizer counts with --model" in refused(nameless)
    unfinished = write_run(tmp_path / "unfinished", [Arm("baseline", Spoken(LONG))])
    (generations,) = unfinished.glob("generations*.jsonl")
    generations.write_text("".join(generations.read_text().splitlines(keepends=True)[:2]))
    assert "has 2 of 4 samples, 2 are missing" in refused(unfinished)
