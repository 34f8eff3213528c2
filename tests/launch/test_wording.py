"""``--wording``: how a question is put, from the command to the prompt that was sampled and the page that says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.core.option_checks import refuse_idle
from launch.core.options import ProblemOptions
from launch.core.prompt_options import own_wording, task_line
from launch.evaluate import main as evaluate
from reasoning_evals.runs import read_generations
from reasoning_evals.tasks import load_task

WORDING = "Solve this: {problem} Write \\boxed{} at the end."


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"So {2 * n}.\n#### {2 * n}"} for n in (2, 3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_prompts_and_the_run_have_it(gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["generate", "--problems", "gsm8k", "--data-dir", str(gsm8k), "--samples", "1", "--max-new-tokens", "8"]
    assert main([*command, "--out", str(out), "--wording", WORDING]) == 0
    assert "asked with: Solve this: Write \\boxed{} at the end." in capsys.readouterr().out
    found = [item.prompt for item in read_generations(out)]
    assert len(found) == 2
    assert all("Solve this: What is" in text and "? Write \\boxed{} at the end." in text for text in found)
    assert not any("Please reason" in text for text in found)
    assert main([*command, "--out", str(out)]) == 1, "another wording is another run"
    assert "prompts" in capsys.readouterr().err


def test_a_job_takes_it_for_a_file_of_problems(gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"problem_id": f"p{n}", "prompt": f"{n} + 1?", "target": str(n + 1), "answer_type": "integer"} for n in (1, 2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--problems", str(file), "--arms", "baseline", "nowait", "--samples", "1", "--max-new-tokens", "8"]
    (words := tmp_path / "words.txt").write_text("{problem} Think.\n")
    assert evaluate([*options, "--out", str(tmp_path / "run"), "--wording", str(words)]) == 0
    assert "asked with: {problem} Think." in capsys.readouterr().out
    assert all("+ 1? Think." in item.prompt for item in read_generations(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["wording"] == "{problem} Think."


@pytest.mark.parametrize(
    ("problems", "wording", "message"),
    [
        ("gsm8k", "Solve it.", "has no {problem}: write {problem} where it belongs"),
        ("lab", "{problem}", "lab makes its questions up"),
        ("mine.jsonl", "x" * 900, "has no {problem}"),
    ],
)
def test_a_wording_that_cannot_be_followed(problems: str, wording: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")) as caught:
        own_wording(problems, wording)
    assert len(str(caught.value)) < 320


def test_the_lab_refuses_it_in_a_job() -> None:
    with pytest.raises(ValueError, match="--wording x is for a task, and the lab makes its problems up"):
        refuse_idle(ProblemOptions(wording="x"))


def test_a_tasks_own_wording_is_what_the_line_says(gsm8k: Path) -> None:
    """The line's words are the task's: put as an option, they give the same prompts."""
    line = task_line(ProblemOptions(model="x/y", problems="gsm8k"))
    own = line.partition("asked with: ")[2]
    plain = load_task("gsm8k", data_dir=gsm8k)
    braces = task_line(ProblemOptions(model="x/y", problems="gsm8k", wording="{problem} Write \\boxed{x}."))
    assert braces.endswith("asked with: Write \\boxed{x}.")
    again = load_task("gsm8k", data_dir=gsm8k, **own_wording("gsm8k", "{problem}\n\n" + own))
    assert [problem.prompt for problem in again] == [problem.prompt for problem in plain]
