"""``moe-steer thinking``: its table, its file, and what wrong folders are told. Run as a program, it writes the golden file anew."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from launch.cli.main import main
from moe_steer.thinking import Thought
from reasoning_evals import Problem
from reasoning_evals.grading import Grade
from reasoning_evals.problems import LABEL
from reasoning_evals.runs.grading_pass import grade_run, read_grades
from reasoning_evals.runs.run import Arm
from spoken_runs import AGAIN, PROBLEMS, RIGHT, WRONG, Spoken, write_run

GOLDEN = Path(__file__).parent / "golden" / "thinking.json"
ANSWERS = {"p0": "{right}", "p1": "99", "p2": "99", "p3": "{right}"}
LONG = {"p0": RIGHT + AGAIN, "p1": RIGHT + AGAIN + WRONG, "p2": WRONG, "p3": RIGHT}
SHORT = {"p0": RIGHT, "p1": RIGHT + WRONG, "p2": WRONG, "p3": ""}


def small_run(folder: Path) -> Path:
    return write_run(folder, [Arm("baseline", Spoken(LONG, ANSWERS)), Arm("short", Spoken(SHORT, ANSWERS))])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run")


def test_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thinking", str(run)]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title == "4 problems x 1 sample; 95% intervals over problems; changes against baseline, paired"
    assert heads.split() == [
        "correct", "thinking", "closed", "attempts", "stated", "chance", "first", "at", "outcome", "new", "answer", "under",
    ]  # fmt: skip
    assert [row[:8].strip() for row in rows[:4]] == ["baseline", "95%", "short", "change"]
    assert rows[0].split() == [
        "baseline", "50.0%", "31.8", "100.0%", "1.75", "75.0%", "0.0%", "17.0", "45.2%", "79.8%", "34.5%",
    ]  # fmt: skip
    assert rows[-1] == "samples without a thought, from attempts on left out: 1 of 4 of short"
    assert len(rows) == 8, "two lines an arm, three of legend, one note"
    assert len({len(line) for line in [heads, *rows[:4]]}) == 1, "columns line up"


def test_the_file_is_the_golden_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "thinking.json"
    assert main(["thinking", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    assert out.read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")


def test_the_file_is_the_same_however_many_ranks_wrote_the_samples(run: Path, tmp_path: Path) -> None:
    (generations,) = run.glob("generations*.jsonl")
    lines = generations.read_text().splitlines(keepends=True)
    generations.unlink()
    for rank in (0, 1):
        (run / f"generations.rank{rank}.jsonl").write_text("".join(reversed(lines[1 - rank :: 2])))
    assert main(["thinking", str(run), "--out", str(tmp_path / "thinking.json")]) == 0
    assert (tmp_path / "thinking.json").read_text() == GOLDEN.read_text(encoding="utf-8")


def test_other_words_and_another_baseline(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "thinking.json"
    assert (
        main(["thinking", str(run), "--switch-words", "once upon", "--baseline-arm", "short", "--out", str(out)]) == 0
    )
    assert "changes against short" in capsys.readouterr().out
    values = json.loads(out.read_text())
    assert values["switch_words"] == ["once upon"]
    assert values["baseline"] == "short"
    baseline, short = values["arms"]
    assert baseline["values"]["attempts"]["mean"] == 1
    assert short["changes"] == {}
    assert set(baseline["changes"]) == set(baseline["values"])


def test_arms_in_folders_of_their_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``moe-steer generate`` leaves them."""
    long = write_run(tmp_path / "long", [Arm("baseline", Spoken(LONG, ANSWERS))])
    short = write_run(tmp_path / "short", [Arm("short", Spoken(SHORT, ANSWERS))])
    assert main(["thinking", str(run)]) == 0
    together = capsys.readouterr().out
    assert main(["thinking", str(long), "--arm-folder", str(short)]) == 0
    assert capsys.readouterr().out == together
    assert main(["thinking", str(long)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "baseline is the only arm: nothing is compared; give the folder of another one with --arm-folder"
    assert not any("change" in line for line in said)


def test_of_a_job_the_test_step_is_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thinking", str(run)]) == 0
    alone = capsys.readouterr().out
    job = tmp_path / "job"
    for step in ("identification", "tuning", "test"):
        shutil.copytree(run, job / step)
    (job / "run.json").write_text('{"version": 1, "config": {"gains": []}}')
    assert main(["thinking", str(job)]) == 0
    assert capsys.readouterr().out == alone


def test_a_chance_rate_that_spoils_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = " ".join(f"It could be that the sum = {number}." for number in range(1, 5))
    folder = write_run(tmp_path / "run", [Arm("baseline", Spoken(dict.fromkeys(LONG, everything), ANSWERS))])
    assert main(["thinking", str(folder)]) == 0
    assert (
        "thoughts often state the answer to ANOTHER problem (baseline 100.0%): a right one means little there"
        in capsys.readouterr().out.splitlines()
    )


def test_an_arm_without_thoughts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mute = Arm("mute", Spoken(dict.fromkeys(LONG, ""), ANSWERS))
    folder = write_run(tmp_path / "run", [Arm("baseline", Spoken(LONG, ANSWERS)), mute])
    assert main(["thinking", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[4].split() == ["mute", "50.0%", "0.0", "100.0%", *["–"] * 7]
    assert "mute holds no thoughts: only its accuracy is known" in said


def test_verdicts_of_a_classifier_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [dataclasses.replace(problem, answer_type=LABEL, target="safe") for problem in PROBLEMS]
    folder = write_run(tmp_path / "run", [Arm("baseline", Spoken(LONG, ANSWERS))], problems)

    def safe(problem: Problem, thought: Thought) -> Grade:
        return Grade("correct", thought.answer[-3:], "safe")

    grade_run(folder, grade=safe)
    before = read_grades(folder)
    assert main(["thinking", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].split()[:5] == ["baseline", "100.0%", said[2].split()[2], "100.0%", "1.75"]
    assert said[2].split()[5:] == ["–"] * 6
    assert (
        "problems that ask for a label, which no thought states: 4 (p0, p1, p2 and 1 more), from stated on left out"
        in said
    )
    assert read_grades(folder) == before


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["thinking", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_wrong_options(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([str(run), "--baseline-arm", "long"], capsys) == (
        f"moe-steer: --baseline-arm long is not an arm of {run}: it has baseline, short\n"
    )
    assert refused([str(run), "--model", "./nowhere"], capsys).startswith("moe-steer: there is no model folder")
    assert "none of them empty" in refused([str(run), "--switch-words", "wait", ""], capsys)
    other = write_run(tmp_path / "other", [Arm("short", Spoken(SHORT, ANSWERS))])
    assert refused([str(run), "--arm-folder", str(other)], capsys) == (
        f"moe-steer: {other} holds another arm named 'short': sample it again with --arm-name OTHER_NAME\n"
    )
    fewer = write_run(tmp_path / "fewer", [Arm("fewer", Spoken(SHORT, ANSWERS))], PROBLEMS[:3])
    assert refused([str(run), "--arm-folder", str(fewer)], capsys) == (
        f"moe-steer: {fewer} and {run} have different problems: sample the same in both\n"
    )
    single = write_run(tmp_path / "single", [Arm("baseline", Spoken(LONG, ANSWERS))], PROBLEMS[:1])
    assert refused([str(single)], capsys) == ("moe-steer: an interval needs at least 2 problems, got 1: add problems\n")


def test_wrong_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "nowhere"):
        assert refused([str(folder)], capsys) == (
            f"moe-steer: {folder} holds no generations: give the folder of a run ('moe-steer generate') or of a job\n"
        )
    job = tmp_path / "job"
    shutil.copytree(run, job / "identification")
    assert refused([str(job)], capsys) == (
        f"moe-steer: {job} holds an unfinished job, without its test: start it again, it continues where it was\n"
    )
    several = tmp_path / "several"
    for task in ("gsm8k", "mmlu"):
        shutil.copytree(run, several / task)
    assert refused([str(several)], capsys) == (
        f"moe-steer: {several} holds several runs: give one of them, {several}/gsm8k, {several}/mmlu\n"
    )
    nameless = write_run(tmp_path / "nameless", [Arm("baseline", Spoken(LONG, ANSWERS, model=None))])
    assert refused([str(nameless)], capsys) == (
        "moe-steer: the run does not name its model: give the one whose tokenizer counts with --model\n"
    )
    assert main(["thinking", str(nameless), "--model", "lab"]) == 0
    capsys.readouterr()
    moved = write_run(tmp_path / "moved", [Arm("baseline", Spoken(LONG, ANSWERS, model="/gone/model"))])
    assert refused([str(moved)], capsys) == (
        "moe-steer: the tokenizer of the run's model cannot be had (there is no model folder '/gone/model': give a folder with "
        "config.json, a hub id or one of lab, lab-plain, lab-dense, lab-search): give one like it with --model\n"
    )
    (generations,) = run.glob("generations*.jsonl")
    generations.write_text("".join(generations.read_text().splitlines(keepends=True)[:2]))
    assert refused([str(run)], capsys) == (
        f"moe-steer: {run} has 2 of 8 samples, 6 are missing (first: ('baseline', 'p2', 0)): run it again, it continues where it was\n"
    )


@pytest.mark.slow
def test_a_run_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampled, traced with the model's own tokenizer: lengths within thoughts are lengths of thoughts."""
    generate = ["generate", "--model", "lab-dense", "--num", "12", "--samples", "2", "--out", str(tmp_path / "run")]
    assert main(generate) == 0
    capsys.readouterr()
    assert main(["thinking", str(tmp_path / "run"), "--out", str(tmp_path / "thinking.json")]) == 0
    (arm,) = json.loads((tmp_path / "thinking.json").read_text())["arms"]
    means = {name: value["mean"] for name, value in arm["values"].items() if value}
    rows = read_grades(tmp_path / "run")
    assert means["accuracy"] == pytest.approx(sum(row.correct for row in rows) / 24, rel=1e-5)
    assert means["thinking_tokens"] == pytest.approx(sum(row.thinking_tokens or 0 for row in rows) / 24, rel=1e-5)
    assert means["attempts"] > 1.5, "lab-dense goes over its work again"
    assert means["outcome_efficiency"] < 0.6 < means["stated"]
    assert 0 < means["first_right_at"] < means["thinking_tokens"]
    assert means["chance"] < 0.2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.exit(main(["thinking", str(small_run(Path(place) / "run")), "--out", str(GOLDEN)]))
