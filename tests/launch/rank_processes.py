"""Start a script on several ranks, with a hard limit of time; nothing is left running, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Finished(NamedTuple):
    """Exit codes by rank (None: killed at the limit), everything printed, seconds."""

    codes: list[int | None]
    text: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """The environment of every rank: one thread, no network, no GPU."""
    paths = [ROOT, ROOT / "tests" / "moe_steer", ROOT / "tests" / "launch"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",  # a native crash says where it was
        **more,
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: Path, num_ranks: int, arguments: Sequence[str], limit: float) -> Finished:
    """Run ``script`` on every rank at once; when one fails, the others are killed 5 s later; at ``limit`` seconds all are."""
    port, started = str(free_port()), time.monotonic()
    processes = []
    for rank in range(num_ranks):
        env = environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                start_new_session=True,
            )
        )
    texts: dict[int, str] = {}
    deadline = started + limit
    try:
        import threading

        readers = [
            threading.Thread(target=lambda i=i, p=p: texts.__setitem__(i, p.communicate()[0]), daemon=True)
            for i, p in enumerate(processes)
        ]
        for reader in readers:
            reader.start()
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            if any(p.poll() not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.1)
        codes = [p.poll() for p in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for reader in readers:
        reader.join(10)
    text = "\n".join(f"[rank {i}] {texts.get(i, '')}" for i in range(num_ranks))
    return Finished(codes, text, time.monotonic() - started)
