"""Problems in a user's own file, from the command to the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from reasoning_evals.tasks.own_file import load_own_file


def generate(file: Path, out: Path) -> int:
    limits = ["--greedy", "--max-new-tokens", "4"]
    return main(["generate", "--model", "lab", "--problems", str(file), *limits, "--out", str(out)])


def test_a_csv_may_leave_optional_cells_empty_and_state_a_tolerance(tmp_path: Path) -> None:
    head = "problem_id,prompt,target,answer_type,unit,tolerance,domain\n"
    (tmp_path / "mine.csv").write_text(f"{head}a,What is 1 + 1?,2,integer,,,\nb,How far?,3.5,quantity,m,0.1,physics\n")
    assert generate(tmp_path / "mine.csv", tmp_path / "run") == 0
    first, second = map(json.loads, (tmp_path / "run" / "problems.jsonl").read_text().splitlines())
    assert [first.get(name) for name in ("target", "unit", "tolerance", "domain")] == ["2", None, None, None]
    assert [second.get(name) for name in ("target", "unit", "tolerance", "domain")] == ["3.5", "m", 0.1, "physics"]


def test_a_blank_cell_says_nothing_and_takes_the_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("prompt,target,answer_type,unit,tolerance\nQ?,2,, ,\t\nR?,x,expression,,\n")
    first, second = load_own_file(str(path), answer_type="number", tolerance=0.5)
    assert (first.answer_type, first.unit, first.tolerance) == ("number", None, 0.5)
    assert second.answer_type == "expression"


@pytest.mark.parametrize(
    "template",
    [
        "{problem} in \\boxed{}",
        "{problem} {x",
        "{problem} }",
        "{unit} {problem}",
        "{problem.x}",
        "{{problem}}",
        "Think.",
    ],
)
def test_a_template_that_is_none_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '{"problem_id": "a", "prompt": "{Q}?", "target": "2", "answer_type": "integer"}\n'
    )
    with pytest.raises(
        ValueError, match="is no template: write {problem} where the question goes, and other braces twice"
    ):
        load_own_file(str(tmp_path / "mine.jsonl"), prompt=template)
    (problem,) = load_own_file(str(tmp_path / "mine.jsonl"), prompt="{problem} In \\boxed{{}}.")
    assert problem.prompt == "{Q}? In \\boxed{}."


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mine.parquet", b"hello", "mine.parquet is no parquet file (.*): make or download it again"),
        ("mine.csv", b"problem_id,prompt,target,answer_type,tolerance\na,Q?,2,number,wide\n", "mine.csv:2: .*tolerance is 'wide'"),
        ("mine.csv", b"problem_id,prompt,target,answer_type\na,Q?,,number\n", "mine.csv:2: problem 'a': target is ''"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_problems_is_refused_in_one_line(
    name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / name).write_bytes(content)
    assert generate(tmp_path / name, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert re.search(said.replace("(.*)", r"\(.*\)"), error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
