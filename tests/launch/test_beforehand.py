"""What a start settles before it reads weights: kind, thinking, context, rows, a task's own sampling."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main as command_line
from launch.core import beforehand
from launch.core.beforehand import BATCHES, _Held, _most_rows
from launch.core.options import ProblemOptions
from launch.core.prompt_options import task_line
from launch.jobs.experts_options import Options
from launch.reduce_overthinking import main as reduce_overthinking
from launch.steer_r1 import main as steer_r1
from moe_steer.lab import LAB_DENSE, LAB_MODEL
from reasoning_evals.tasks import SPECS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's model under a path: treated like any model of a user's own."""
    place = tmp_path_factory.mktemp("own") / "model"
    place.mkdir()
    for file in LAB_MODEL.iterdir():
        if file.is_file():
            (place / file.name).symlink_to(file)
    return place


def problems(path: Path, number: int = 4) -> str:
    rows = [
        {"problem_id": f"p{i}", "prompt": f"What is {i} + 2?", "target": str(i + 2), "answer_type": "integer"}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def holding(most: int, backend: str = "plain", shared: int = 0) -> Any:
    """A machine that holds ``most`` rows under a backend, and ``shared`` under tp_ep."""

    def fits(rows: int, rests: bool) -> _Held:
        if rows <= most:
            return _Held(backend, f"{backend}, {rows}")
        if rows <= shared:
            return _Held("tp_ep", f"tp_ep, {rows}")
        raise ValueError(f"{rows} rows do not fit")

    return fits


@pytest.mark.parametrize("most", [*BATCHES, 63, 17])
def test_the_largest_number_that_fits_is_taken(most: int) -> None:
    assert _most_rows(holding(most), 64, 1)[0] == max(number for number in BATCHES if number <= most)


def test_ranks_with_rows_of_their_own_count_all_of_them() -> None:
    assert _most_rows(holding(16, shared=32), 64, 8) == (16, _Held("plain", "plain, 16"))
    assert _most_rows(holding(1, shared=64), 64, 8) == (64, _Held("tp_ep", "tp_ep, 64"))
    assert _most_rows(holding(0, shared=8), 64, 8) == (8, _Held("tp_ep", "tp_ep, 8"))
    with pytest.raises(ValueError, match="1 rows do not fit"):
        _most_rows(holding(0), 64, 8)


def test_the_batch_is_stored_and_a_smaller_machine_goes_on_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beforehand, "_fits", lambda *_: holding(8))
    job = [
        "generate",
        "--model",
        str(folder),
        "--problems",
        problems(tmp_path / "p.jsonl", 9),
        "--max-new-tokens",
        "12",
    ]
    out = tmp_path / "run"
    assert command_line([*job, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "batch: 8 rows of up to" in said
    assert "as many as fit, and up to 64 where answers turn out shorter; plain, 8" in said
    assert json.loads((out / "run.json").read_text())["config"]["sampling"]["batch_size"] == 64
    lines = (out / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (out / "generations.jsonl").write_bytes(b"".join(lines[:4]))
    monkeypatch.setattr(beforehand, "_fits", lambda *_: holding(2))
    assert command_line([*job, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "batch: 64 rows, as this run began, 2 of them at once, which is what fits here, and up to 64" in said
    again = (out / "generations.jsonl").read_text().splitlines()
    tokens = {line["problem_id"]: line["token_ids"] for line in map(json.loads, again)}
    assert tokens == {line["problem_id"]: line["token_ids"] for line in map(json.loads, lines)}


def test_answers_are_held_against_the_context(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", str(folder), "--problems", problems(tmp_path / "p.jsonl", 9), "--dry-run"]
    assert steer_r1([*job, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    limit = int(said.split("answers: at most ")[1].split()[0])
    prompt = int(said.split("prompts of up to ")[1].split()[0])
    assert limit + prompt == 512
    assert f"the context of {folder}, 512 tokens" in said
    assert f"answers at most {limit}\n" in said
    assert steer_r1([*job, "--out", str(tmp_path / "run"), "--max-new-tokens", "600"]) == 1
    error = capsys.readouterr().err
    assert f"answers of 600 tokens after prompts of up to {prompt} do not fit the context of {folder}" in error
    assert f"--max-new-tokens may be {limit} at most" in error
    assert error.count("\n") == 1


def test_the_kind_of_model_comes_before_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in ("experts", "overthinking"):
        monkeypatch.setattr(f"launch.jobs.{job}.settle", lambda *_: pytest.fail("memory is asked about"))
    monkeypatch.setattr("launch.jobs.experts.settle", beforehand.settle)
    monkeypatch.setattr("launch.jobs.overthinking.settle", beforehand.settle)
    assert steer_r1(["--model", "lab-dense", "--out", str(tmp_path / "a")]) == 1
    assert "lab-dense is a dense model and has no experts to find: give --plan" in capsys.readouterr().err
    assert reduce_overthinking(["--model", "lab-dense", "--thinking", "none", "--out", str(tmp_path / "b")]) == 1
    error = capsys.readouterr().err
    assert "lab-dense does not think" in error
    assert "--thinking" in error
    assert not (tmp_path / "b").exists()


def test_advice_names_options_of_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", str(folder), "--problems", problems(tmp_path / "p.jsonl", 9), "--dry-run", "--gpus", "8"]
    assert steer_r1([*job, "--gpu-gib", "0.0005", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "--batch or --context" not in error
    assert "no backend fits" in error
    assert command_line(["memory", "--model", "lab", "--gpus", "1", "--gpu-gib", "0.005", "--batch", "64"]) == 1
    assert "a smaller --batch or --context" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["aime2024", "math500", "gsm8k", "gpqa_diamond", "mmlu"])
def test_a_task_brings_its_own_sampling_and_an_option_wins(name: str) -> None:
    spec = SPECS[name]
    options = ProblemOptions(model="someone/model", problems=name)
    assert options.num_samples == spec.k
    assert options.token_limit == spec.sampling.max_new_tokens
    assert options.takes_most_likely == (spec.sampling.temperature == 0)
    assert options.nucleus == spec.sampling.top_p
    assert options.takes_most_likely or options.heat == spec.sampling.temperature
    line = task_line(options)
    assert line.startswith(f"task {name}: {spec.k} sample")
    assert "(its own defaults); asked with: Please reason" in line or name == "mmlu"
    own = ProblemOptions(model="someone/model", problems=name, samples=2, temperature=0.9, top_p=0.5, max_new_tokens=77)
    assert (own.num_samples, own.heat, own.nucleus, own.token_limit) == (2, 0.9, 0.5, 77)
    assert task_line(own).startswith(
        f"task {name}: 2 samples, temperature 0.9, top-p 0.5, at most 77 new tokens (its own"
    )


def test_problems_of_ones_own_keep_the_usual_sampling() -> None:
    options = Options(model="someone/model", problems="mine.jsonl")
    assert (options.num_samples, options.heat, options.nucleus, options.token_limit) == (4, 0.6, 0.95, 32768)
    assert task_line(options) == ""
    with pytest.raises(ValueError, match="same answer every time: leave --samples 3 out, or give --temperature"):
        ProblemOptions(model="someone/model", problems="mmlu", samples=3)


def test_two_runs_that_were_not_named_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["generate", "--num", "3", "--max-new-tokens", "8"]
    for name, heat in (("cool", "0.6"), ("warm", "1.0")):
        assert command_line([*job, "--temperature", heat, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    cool, warm = str(tmp_path / "cool"), str(tmp_path / "warm")
    assert command_line(["compare", "--baseline", cool, "--arm-folder", warm]) == 0
    said = capsys.readouterr().out
    assert f"two runs call an arm 'baseline': that of {warm} is named 'warm' here" in said
    assert "\nbaseline: " in said
    assert "\nwarm: 0.0% correct" in said
    assert command_line(["compare", "--baseline", cool, "--arm-folder", cool + "/"]) == 1
    assert "is given twice: give every run once" in capsys.readouterr().err


DISTILLED = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
"""The published configuration of DeepSeek-R1-Distill-Qwen-7B."""


@pytest.mark.parametrize("job", ["reduce_overthinking", "evaluate"])
def test_every_job_has_a_dry_run(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    main = import_module(f"launch.{job}").main
    model = tmp_path / "distilled"
    shutil.copytree(LAB_DENSE, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (model / "config.json").write_text(json.dumps(DISTILLED))
    problems = [
        {"problem_id": f"p{n}", "prompt": f"{n} + 1?", "target": str(n + 1), "answer_type": "integer"}
        for n in range(12)
    ]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    more = ["--arms", "baseline", "nowait"] if job == "evaluate" else []
    asked = ["--model", str(model), "--problems", "sums.jsonl", *more]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*asked, "--dry-run", "--gpus", "1", "--gpu-gib", "80"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"memory    (16|32) rows of up to 32\d{3} tokens; plain: the fastest that fits", said)
    assert said.rstrip().endswith("dry run: nothing was loaded or written")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(SystemExit):
        main([*asked, "--gpus", "1", "--gpu-gib", "80"])
