"""Offloading weights from the device: ZeRO-3's shards to CPU memory or to files on an NVMe disk; a folder for either backend.

DeepSpeed's operator async_io moves the files (compiled here, once on a machine), and three of its problems are silent: parts below 1 MiB
never leave memory, runs that share a folder delete each other's files, and the files remain after the run. They are handled here. It is
compiled once per machine by one process, while the others wait: torch protects a compile with a file ``lock``, which a killed process
leaves behind, so that every later start would wait endlessly. It is deleted here when no process has it open.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

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


SMALLEST = 2**20
"""Bytes; ``deepspeed.runtime.swap_tensor.utils.MIN_AIO_BYTES``: a smaller part of a parameter stays in memory."""
BUFFERS = 5
"""Parts of parameters that are read from NVMe at once: more than the direct parameters of any module."""


def in_cpu_memory() -> dict[str, Any]:
    """The ``offload_param`` section of a DeepSpeed configuration for CPU memory."""
    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def on_nvme(offload: str, parts: Sequence[int], dtype: torch.dtype, local_ranks: int) -> dict[str, Any]:
    """The same for files below the folder ``offload``, for parts of so many elements, one for each parameter of the model.

    The files lie in a folder of this rank's own, ``nvme_path``, which is deleted when the process ends, at the latest.
    ValueError, in one line, for a missing folder, a file system without direct I/O or without space, a model too small for
    offloading, and an operator that cannot be compiled.
    """
    folder = _existing(offload)
    moved = sum(part * dtype.itemsize for part in parts if part * dtype.itemsize >= SMALLEST)
    if not moved:
        raise ValueError(
            "offload to NVMe would move nothing: no parameter has a part of 1 MiB on a rank, and smaller ones stay in memory; "
            "leave offload out, or use 'cpu'"
        )
    _refuse_without_direct_io(folder)
    free = shutil.disk_usage(folder).free
    if free < moved * local_ranks:
        raise ValueError(
            f"offload needs {moved * local_ranks / 2**30:.1f} GiB in {offload!r} for this machine's {local_ranks} ranks, "
            f"{free / 2**30:.1f} GiB are free: make room, or use another disk"
        )
    refuse_without_compiler()
    compile_once()
    return {
        "device": "nvme",
        "nvme_path": own_folder(offload),
        "buffer_count": BUFFERS,
        "buffer_size": max(parts),
    }


def own_folder(offload: str) -> str:
    """A new folder of this process below ``offload``, deleted when the process ends, at the latest; what killed processes
    have left there is deleted now. ValueError where there is no folder ``offload``."""
    folder = _existing(offload)
    _sweep(folder)
    own = tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=folder)
    atexit.register(delete, own)
    return own


def _existing(offload: str) -> Path:
    if not Path(offload).is_dir():
        raise ValueError(f"offload names no folder: {offload!r}: give 'cpu' or an existing folder on a local NVMe disk")
    return Path(offload)


def delete(folder: str) -> None:
    """Delete the files of a rank."""
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_without_direct_io(folder: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise ValueError(
            f"offload cannot write past the page cache in {os.fspath(folder)!r} ({error.strerror}): "
            "give a folder of yours on a local disk, not in memory or on a network"
        ) from error


def _prefix() -> str:
    return f"weights-{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Delete the files of killed runs of this machine."""
    for path in folder.glob(f"{_prefix()}*"):
        pid = path.name.removeprefix(_prefix()).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            delete(str(path))
