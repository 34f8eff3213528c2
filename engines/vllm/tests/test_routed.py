"""Routing that a running vLLM returns, from the user's command to the counts and to the main job's report.

On a CPU vLLM returns it up to 0.30 only (later versions need a runner that CPUs lack): ``PYTHONPATH`` has that version.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from reasoning_evals.runs import read_audit, read_run
from test_http import Server

pytestmark = pytest.mark.routed
EAGER = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--enable-return-routed-experts")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(folder, tmp_path_factory.mktemp("serve") / "log", options=["--enable-return-routed-experts"])
    yield started
    started.end(signal.SIGTERM)


def run(*arguments: Any) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_counts_equal_those_of_this_process_to_the_last_one(server: Server, tmp_path: Path) -> None:
    run(
        "launch.cli.main",
        "generate",
        "--num",
        12,
        "--samples",
        2,
        "--max-new-tokens",
        128,
        "--out",
        tmp_path / "traces",
    )
    collect = ["launch.cli.main", "collect", "--model", "lab", "--traces", tmp_path / "traces"]
    run(*collect, "--out", tmp_path / "here.safetensors")
    run(*collect, "--out", tmp_path / "there.safetensors", "--endpoint", f"{server.url}/v1")
    here, there = (load_file(tmp_path / f"{name}.safetensors") for name in ("here", "there"))
    assert set(here) == set(there)
    assert here["total_NB"].sum() > 1000
    for name in here:
        assert (here[name] == there[name]).all(), name


def test_the_main_job_searches_on_a_server_that_it_starts(tmp_path: Path) -> None:
    own = ["--engine", "vllm", "--engine-python", os.environ["STEER_PYTHON"]]
    run("launch.steer_r1", "--quick", *own, f"--engine-options={' '.join(EAGER)}", "--out", tmp_path)
    assert read_run(tmp_path / "test")["config"]["arm_order"] == ["baseline", "steered", "placebo"]
    audit = read_audit(tmp_path / "test").rows
    for arm in ("steered", "placebo"):
        assert all(row["tokens"] > 0 for row in audit[arm] if row["kind"] == "expert"), arm
    assert "95% interval from 32 problems that did not choose it" in (tmp_path / "report.md").read_text()
