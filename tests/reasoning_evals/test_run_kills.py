"""Fifty kills with signal 9 at random moments, then the end of the run: what comes out is what an unbroken run gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from killed_runs import many_problems, run_and_grade
from reasoning_evals import compare_arms
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.grading_pass import grade_run
from reasoning_evals.runs.run_folder import read_generations

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NUM_KILLS = 50


@pytest.mark.parametrize("world_size", [1, 2])
def test_fifty_kills_at_random_moments_change_nothing(world_size: int, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    run_and_grade(unbroken, 1)
    command = [sys.executable, str(HERE / "killed_runs.py"), str(killed), str(world_size), "20", str(NUM_KILLS)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    history = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(history) == NUM_KILLS
    assert all(-signal.SIGKILL in entry["ended"] for entry in history), "every kill met a process at work"
    ended = {code for entry in history for code in entry["ended"]}
    # On a busy machine one of two ranks may come to the end of its share while the other has still some to do.
    assert ended <= ({-signal.SIGKILL} if world_size == 1 else {-signal.SIGKILL, 0}), "none had failed"
    assert sum(entry["torn"] for entry in history) >= 5
    assert len({entry["bytes"] for entry in history}) > 10, "the kills came at many stages of the run"
    final = sum(path.stat().st_size for path in killed.glob("generations*.jsonl"))
    assert 0.05 * final < history[-1]["bytes"] < final, "the run was well under way and not at its end"

    def samples(folder: Path) -> list[str]:
        return sorted(completion.to_json() for completion in read_generations(folder))

    assert len(samples(unbroken)) == 2 * 4 * len(many_problems())
    assert samples(killed) == samples(unbroken)
    lines = sum(len(path.read_bytes().splitlines()) for path in killed.glob("generations*.jsonl"))
    assert lines == len(samples(unbroken)), "no sample is there twice"
    assert read_audit(killed).rows == read_audit(unbroken).rows
    assert read_audit(killed).gates == read_audit(unbroken).gates
    assert len(read_audit(killed).gates) == 160
    assert (killed / "grades.jsonl").read_bytes() == (unbroken / "grades.jsonl").read_bytes()
    assert compare_arms(grade_run(killed)).to_json() == compare_arms(grade_run(unbroken)).to_json()
    if world_size == 1:
        assert (killed / "generations.jsonl").read_bytes() == (unbroken / "generations.jsonl").read_bytes()
