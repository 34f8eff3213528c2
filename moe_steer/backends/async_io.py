"""DeepSpeed's operator async_io: compiled once per machine by one process, while the others wait.

torch protects a compile with a file ``lock``. A killed process leaves it behind, and every later start would wait
endlessly. It is deleted here when no process has it open.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIVE_UP_S = 600.0
"""Stop waiting for a compile that has written nothing for so long."""


def refuse_without_compiler() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    missing = [name for name, there in (("g++", shutil.which("g++")), ("ninja", shutil.which("ninja"))) if not there]
    if not AsyncIOBuilder().is_compatible(verbose=False):
        missing.insert(0, "libaio-dev")
    if missing:
        raise ValueError(
            f"offload to NVMe needs DeepSpeed's operator async_io, which is compiled here: {', '.join(missing)} missing; "
            "install it, or use offload 'cpu'"
        )


def compile_once() -> None:
    """Load the operator, compiled by one process of this machine while the others wait."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / "async_io.turn"):
        for name in ("async_io", "pin_memory"):
            for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
                _wait_for(lock)
        if not [*root.glob("async_io/*.so"), *root.glob("*/async_io/*.so")]:
            _say("compiling DeepSpeed's operator async_io, once on this machine: this takes some minutes")
        AsyncIOBuilder().load(verbose=False)


@contextmanager
def _alone(turn: Path) -> Iterator[None]:
    """A lock that the system releases when its process ends, unlike torch's."""
    with turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for(lock: Path) -> None:
    """Wait until the compile of this lock has finished; delete the lock if its process is dead.

    ValueError if a process holds it but has written nothing for ``GIVE_UP_S``.
    """
    told, last_s = False, time.time()
    while lock.exists():
        with suppress(FileNotFoundError):  # a temporary file of the compiler that has just been deleted: it is alive
            last_s = max(path.stat().st_mtime for path in (lock.parent, *lock.parent.iterdir()))
        if time.time() - last_s > GIVE_UP_S:
            if holder := _holder(lock):
                raise ValueError(
                    f"process {holder} has been compiling DeepSpeed's operator {lock.parent.name} without writing anything "
                    f"for {GIVE_UP_S / 60:.0f} minutes: end it and start again"
                )
            _say(f"deleting {lock}, which a compile that was killed has left")
            lock.unlink(missing_ok=True)
            return
        if not told:
            _say(f"waiting for another compile of {lock.parent.name}; if there is none, delete {lock}")
            told = True
        time.sleep(0.5)


def _holder(lock: Path) -> int | None:
    """A process of this machine that has the file open (torch keeps it open while compiling)."""
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or belongs to another user, who cannot have created our lock
            if os.path.samefile(opened, lock):
                return int(opened.parts[2])
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
