"""DeepSpeed's operator async_io: compiled at the first start on a machine, by one process, while the others wait.

torch guards a compile by a file, ``lock``, that a process leaves behind when it is killed; every later start would then
wait for ever. It is deleted here when nobody holds it any more.
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
"""A lock beside which nothing has been written for so long is no longer worth waiting for."""


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
    """A lock that goes with its process, unlike torch's."""
    with turn.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for(lock: Path) -> None:
    """Until the compile that made this lock is over, or is known to be dead: then the lock is deleted.

    ValueError if somebody holds it, but has written nothing for ``GIVE_UP_S``.
    """
    told, last_s = False, time.time()
    while lock.exists():
        with suppress(FileNotFoundError):  # a file of the compiler's that has just gone is a sign of life
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
    """A process of this machine that has the file open, as torch has as long as it compiles."""
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process has gone, or is another user's, who cannot have made our lock
            if os.path.samefile(opened, lock):
                return int(opened.parts[2])
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
