"""llama.cpp's own HTTP server (in the package xllamacpp): a baked GGUF file checked while it is served, and a job on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cli.main import main as command_line
from launch.evaluate import main as evaluate
from moe_steer import ExpertGain, SteeringPlan
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp (102 MB)")
pytest.importorskip("gguf")

PLAN = SteeringPlan(experts=[ExpertGain(2, 5, 64.0), ExpertGain(3, 2, 16.0)])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lab.gguf, and the same with the plan in it as baked.gguf."""
    from lab_gguf import write_lab_gguf

    folder = tmp_path_factory.mktemp("gguf")
    PLAN.save(folder / "loud.json")
    source, baked = write_lab_gguf(folder / "lab.gguf"), folder / "baked.gguf"
    assert command_line(["bake", "--model", str(source), "--plan", str(folder / "loud.json"), "--out", str(baked)]) == 0
    return folder


@contextmanager
def llama_server(model: Path) -> Iterator[str]:
    """The address of a server of this file, for the length of the block."""
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.model_alias = str(model), {"lab"}
    asked.n_ctx, asked.n_parallel, asked.port = 2048, 4, 0
    asked.warmup, asked.verbosity = False, 0
    server = xllamacpp.Server(asked)
    yield f"{server.listening_address}/v1"
    del server


def test_a_baked_gguf_file_is_checked_while_it_is_served(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify = ["verify", "--model", "lab", "--baked", str(files / "baked.gguf"), "--max-new-tokens", "16", "--endpoint"]
    with llama_server(files / "baked.gguf") as url:
        assert command_line([*verify, url]) == 0
    shown = capsys.readouterr().out
    assert "the server serves the steered model: 5 prompts, 80 greedy tokens" in shown
    assert "100% of that on the server" in shown
    assert "; 80 are the steered model's choice" in shown
    with llama_server(files / "lab.gguf") as url:
        assert command_line([*verify, url]) == 1
    assert "the server serves the plain model" in capsys.readouterr().err


def test_a_job_on_it_gives_the_answers_of_the_model_here(files: Path, tmp_path: Path) -> None:
    asked = ["--arms", "baseline", "prompt-after", "--num-problems", "4", "--samples", "1", "--greedy"]
    asked += ["--max-new-tokens", "24", "--out"]
    assert evaluate([*asked, str(tmp_path / "here")]) == 0
    with llama_server(files / "lab.gguf") as url:
        assert evaluate([*asked, str(tmp_path / "there"), "--endpoint", url]) == 0
    here, there = (
        {(item.arm, item.problem_id): item.text for item in read_generations(tmp_path / name)}
        for name in ("here", "there")
    )
    assert here == there
    assert len(here) == 8
    assert [row["samples"] for row in read_audit(tmp_path / "there").rows["baseline"]] == [4]


def test_steering_plans_are_refused_on_it_by_the_command_that_serves_them(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--arms", "baseline", f"plan:{files / 'loud.json'}", "--num-problems", "2", "--samples", "1", "--greedy"]
    with llama_server(files / "lab.gguf") as url:
        assert evaluate([*asked, "--out", str(tmp_path / "run"), "--endpoint", url]) == 1
    assert "takes no steering plans (GET /v1/steering names none)" in capsys.readouterr().err
