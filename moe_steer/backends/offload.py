"""Offloading weights from the device: ZeRO-3's shards to CPU memory or to files on an NVMe disk; a folder for either backend.

DeepSpeed's operator async_io moves the files (see ``async_io``), and three of its problems are silent: parts below 1 MiB
never leave memory, runs that share a folder delete each other's files, and the files remain after the run. They are handled
here.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_steer.backends import async_io

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
    async_io.refuse_without_compiler()
    async_io.compile_once()
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
