"""A rank that fails while the others wait for it. Usage: failing_worker.py --mode MODE --folder FOLDER, on every rank."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from launch.core.ranks import Ranks, leave, start


@dataclass(frozen=True, kw_only=True)
class Options:
    """How rank 1 fails."""

    mode: Literal["kill", "raise", "memory", "refuse", "hang", "wait", "idle", "slow"]
    folder: str
    local_rank: int = 0


def run(options: Options, ranks: Ranks) -> None:
    """Rank 1 fails in the middle of a run; rank 0 waits in a collective for it."""
    folder = Path(options.folder)
    (folder / f"pid{ranks.rank}").write_text(str(os.getpid()))
    if options.mode == "refuse":
        from moe_steer import load_model

        load_model(folder / "nothing", backend="tp_ep")
    ranks.barrier()
    if ranks.is_main:
        (folder / "kept.jsonl").write_text("a finished sample\n")
    ranks.barrier()
    if options.mode in ("idle", "slow"):  # rank 1 has a share left, and writes nothing or something
        for _ in range(12 if ranks.rank == 1 else 0):
            time.sleep(0.5)
            if options.mode == "slow":
                with (folder / "kept.jsonl").open("a") as file:
                    file.write("another finished sample\n")
        ranks.wait_while_growing(folder)
        return
    if ranks.rank == 1:
        (folder / "failed_at").write_text(str(time.time()))
        if options.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if options.mode == "raise":
            raise OSError("the disk of rank 1 is full")
        if options.mode == "memory":
            torch.empty(2**60, dtype=torch.uint8)
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    leave(start(Options, run, program="job"))
