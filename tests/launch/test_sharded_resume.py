"""A run that breaks off under one backend and goes on under another, on another number of ranks, is one whole run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from launch.core.failure import OUT_OF_GPU_MEMORY
from launch.steer_r1 import main
from moe_steer import ExpertGain, SteeringPlan
from rank_processes import ROOT, run_ranks
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.runs.run_folder import read_generations
from resume_worker import fail_after

WORKER = ROOT / "tests" / "launch" / "resume_worker.py"
SMALL = ["--greedy", "--num-test", "12", "--batch-size", "4", "--max-new-tokens", "12"]
MEMORY = OUT_OF_GPU_MEMORY


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    SteeringPlan(experts=[ExpertGain(2, 3, 4.0), ExpertGain(3, 15, 0.0)]).save(folder / "plan.json")
    return [*SMALL, "--plan", str(folder / "plan.json")]


@pytest.fixture(scope="module")
def unbroken(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert main([*job, "--out", str(folder)]) == 0
    return folder


def lines(folder: Path) -> Counter[str]:
    """Every stored sample of the test, as it was written."""
    files = (folder / "test").glob("generations*.jsonl")
    return Counter(line for path in files for line in path.read_text().splitlines() if line.endswith("}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "samples"),
    [
        ("tp_ep", 20),  # all ranks make every sample: 12 for calibration, then those of the test
        ("zero3", 12),  # 8 of 12, then those of the test
        ("autoep", 12),
    ],
)
def test_two_ranks_then_one_then_two(
    backend: str, samples: int, job: list[str], unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*job, "--out", str(tmp_path / "run")]
    folder = tmp_path / "run"
    sharded = [*options, "--backend", backend]
    done = run_ranks(WORKER, 2, [str(samples), *sharded], 120)
    assert set(done.codes) == {1}
    assert done.text.count(MEMORY) == done.text.count("steer_r1.py: ") == 1, done.text[-3000:]
    assert f"steer_r1.py: rank 1: {MEMORY}" in done.text
    first = lines(folder)
    assert 0 < first.total() < 36

    with pytest.MonkeyPatch.context() as patch:  # one process goes on, and breaks off too
        patch.setattr(InProcessSampler, "sample", InProcessSampler.sample)
        fail_after(5)
        assert main(options) == 1
    assert MEMORY in capsys.readouterr().err
    second = lines(folder)
    assert first < second
    assert second.total() < 36

    if backend == "autoep":
        assert main(options) == 0
    else:
        done = run_ranks(WORKER, 2, ["0", *sharded], 120)
        assert done.codes == [0, 0], done.text[-3000:]
    third = lines(folder)
    assert second < third
    assert set(third.values()) == {1}
    assert third.total() == 36  # 12 problems in three arms: nothing is missing, nothing was made twice
    assert main(options) == 0, "a finished run is left as it is"
    assert lines(folder) == third

    tokens = [
        {item.key[:4]: item.token_ids for item in read_generations(where / "test")} for where in (unbroken, folder)
    ]
    assert tokens[0] == tokens[1]
    results = [json.loads((where / "results.json").read_text()) for where in (unbroken, folder)]
    assert results[0]["sentence"] == results[1]["sentence"]
    fired = [[row["tokens"] for row in result["firing"]["steered"]] for result in results]
    assert fired[0] == fired[1]
    history = [(entry["backend"], entry["ranks"]) for entry in json.loads((folder / "run.json").read_text())["history"]]
    assert history == [(backend, 2), ("plain", 1), ("plain", 1) if backend == "autoep" else (backend, 2), ("plain", 1)]
