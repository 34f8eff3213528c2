"""Where ZeRO-3 keeps its shards off the device: CPU memory, or files on an NVMe disk.

DeepSpeed's operator async_io moves the files. It is compiled at the first start on a machine, and several things around it
pass without a word: parts below 1 MiB never leave memory, runs that share a folder delete one another's files, the files
outlive the run, and a compile that was killed leaves a lock for which every later start waits for ever.
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

SMALLEST = 2**20
"""Bytes; ``deepspeed.runtime.swap_tensor.utils.MIN_AIO_BYTES``: a smaller part of a parameter stays in memory."""
BUFFERS = 5
"""Parts of parameters that are on their way from NVMe at once: more than any module has parameters of its own."""
GIVE_UP_S = 600.0
"""A lock beside which nothing has been written for so long belongs to nobody."""


def in_cpu_memory() -> dict[str, Any]:
    """The ``offload_param`` section of a DeepSpeed configuration for CPU memory."""
    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def on_nvme(offload: str, parts: Sequence[int], dtype: torch.dtype, local_ranks: int) -> dict[str, Any]:
    """The same for files below the folder ``offload``, for parts of so many elements, one for each parameter of the model.

    The files lie in a folder of this rank's own, ``nvme_path``, which goes with the process at the latest.
    ValueError, in one line, for no such folder, a file system that cannot do it or is too full, a model of which nothing
    would lie there, and an operator that cannot be compiled.
    """
    folder = Path(offload)
    if not folder.is_dir():
        raise ValueError(f"offload names no folder: {offload!r}: give 'cpu' or an existing folder on a local NVMe disk")
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
    _refuse_without_compiler()
    _compile()
    _sweep(folder)
    own = tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=folder)
    atexit.register(delete, own)
    return {
        "device": "nvme",
        "nvme_path": own,
        "buffer_count": BUFFERS,
        "buffer_size": max(parts),
    }


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


def _refuse_without_compiler() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    missing = [name for name, there in (("g++", shutil.which("g++")), ("ninja", shutil.which("ninja"))) if not there]
    if not AsyncIOBuilder().is_compatible(verbose=False):
        missing.insert(0, "libaio-dev")
    if missing:
        raise ValueError(
            f"offload to NVMe needs DeepSpeed's operator async_io, which is compiled here: {', '.join(missing)} missing; "
            "install it, or use offload 'cpu'"
        )


def _compile() -> None:
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
    """Until the compile that made this lock is over; ValueError if nobody is at it any more."""
    told, last_s = False, time.time()
    while lock.exists():
        with suppress(FileNotFoundError):  # a file of the compiler's that has just gone is a sign of life
            last_s = max(path.stat().st_mtime for path in (lock.parent, *lock.parent.iterdir()))
        if time.time() - last_s > GIVE_UP_S:
            raise ValueError(
                f"a compile of DeepSpeed's operator {lock.parent.name} was stopped half-way: delete {lock} and start again"
            )
        if not told:
            _say(f"waiting for another compile of {lock.parent.name}; if there is none, delete {lock}")
            told = True
        time.sleep(0.5)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prefix() -> str:
    return f"zero3-{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Delete what killed runs of this machine have left."""
    for path in folder.glob(f"{_prefix()}*"):
        pid = path.name.removeprefix(_prefix()).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            delete(str(path))
