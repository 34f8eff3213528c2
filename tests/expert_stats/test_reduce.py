"""Processes with disjoint shares end with the counts of all; shares that do not fit are refused by every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expert_stats import RoutingCounts, reduce_counts
from stats_helpers import random_counts, signature

ROOT = Path(__file__).parents[2]
WORKER = """
import os, sys
import torch.distributed as dist
from expert_stats import RoutingCounts, reduce_counts

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
reduce_counts(RoutingCounts.load(f"{folder}/share{rank}")).save(f"{folder}/sum{rank}")
try:
    reduce_counts(RoutingCounts.load(f"{folder}/odd{rank}"))
except ValueError as error:
    print(error)
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort the interpreter's own way out
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    shares = [random_counts(0), random_counts(1)]
    for rank, share in enumerate(shares):
        share.save(tmp_path / f"share{rank}")
        RoutingCounts.zeros(signature(base=["all", "generated"][rank])).save(tmp_path / f"odd{rank}")
    command = [sys.executable, "-c", WORKER]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        done = [worker.communicate(timeout=120) for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.kill()
        pytest.fail("two processes did not finish: a collective call was missed")
    for worker, (out, err) in zip(workers, done, strict=True):
        assert worker.returncode == 0, err
        assert "these counts cannot be added: base is 'all' here and 'generated' there" in out
    assert [RoutingCounts.load(tmp_path / f"sum{rank}") for rank in range(2)] == [shares[0] + shares[1]] * 2


def test_one_process_needs_no_reduction() -> None:
    counts = random_counts(0)
    assert reduce_counts(counts) is counts
