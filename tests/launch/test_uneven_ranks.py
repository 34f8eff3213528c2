"""In every job a rank waits for another one that has more to sample, as long as samples appear; and the wait can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import safety_files
from launch.jobs import JOBS
from moe_steer import ExpertGain, SteeringPlan
from rank_processes import run_ranks
from uneven_worker import SECONDS, SLOW_SAMPLES

WORKER = Path(__file__).with_name("uneven_worker.py")
SMALL = ["--greedy", "--max-new-tokens", "8", "--batch-size", "1"]
PATIENCE = 15.0


def job_options(folder: Path) -> dict[str, list[str]]:
    """Every job with six samples or more for rank 1."""
    SteeringPlan(experts=[ExpertGain(2, 3, 16.0)]).save(folder / "plan.json")
    tiny = safety_files.write_all(folder)
    return {
        "experts": [*SMALL, "--plan", str(folder / "plan.json"), "--num-test", "12"],
        "overthinking": [*SMALL, "--methods", "nowait", "--num-test", "12"],
        "evaluation": [*SMALL, "--arms", "baseline", "nowait", "--num-problems", "12"],
        "safety_job": [
            *tiny,
            "--arms",
            "baseline",
            "hand-prompt",
            "--attack-tokens",
            "2",
            "--gsm8k-tokens",
            "2",
            "--batch-size",
            "1",
        ],
    }


@pytest.mark.slow
def test_no_job_gives_up_a_rank_that_still_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = job_options(tmp_path)
    assert {JOBS[name].rpartition(".")[2] for name in JOBS} == options.keys(), "every job is here"
    (tmp_path / "jobs.json").write_text(json.dumps(options))
    monkeypatch.setenv("MOE_STEER_WAIT_SECONDS", str(PATIENCE))
    assert SLOW_SAMPLES * SECONDS > PATIENCE
    done = run_ranks(
        WORKER, 2, [str(tmp_path)], 280, runs=[*options]
    )  # side by side: their ranks sleep most of the time
    assert done.codes == [0, 0] * len(options), done.text[-3000:]
    assert [line for line in done.text.splitlines() if line.startswith("DONE")] == [f"DONE {name}" for name in options]
