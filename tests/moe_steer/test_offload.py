"""Shards on NVMe: what is refused beforehand, what DeepSpeed is told, what is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_steer.backends import offload

PARTS = [300_000, 10, 500_000]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the operator is compiled."""
    monkeypatch.setattr(offload, "refuse_without_compiler", lambda: None)
    monkeypatch.setattr(offload, "compile_once", lambda: None)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="offload names no folder: '/no/such/disk': give 'cpu' or an existing folder"):
        offload.on_nvme("/no/such/disk", PARTS, torch.float32, 2)


def test_a_model_of_which_nothing_would_lie_there(tmp_path: Path, ready: None) -> None:
    with pytest.raises(ValueError, match="would move nothing: no parameter has a part of 1 MiB.*or use 'cpu'"):
        offload.on_nvme(str(tmp_path), PARTS, torch.float16, 2)
    assert not list(tmp_path.iterdir())


def test_the_least_part_is_deepspeeds() -> None:
    from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES

    assert offload.SMALLEST == MIN_AIO_BYTES


def test_a_file_system_without_direct_io(tmp_path: Path, ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", without)
    with pytest.raises(
        ValueError, match=r"cannot write past the page cache.*\(Invalid argument\): give a folder of yours"
    ):
        offload.on_nvme(str(tmp_path), PARTS, torch.float32, 2)


def test_a_disk_too_full(tmp_path: Path, ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = (300_000 + 500_000) * 4 * 2
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="needs 0.0 GiB in .* for this machine's 2 ranks, 0.0 GiB are free: make room"):
        offload.on_nvme(str(tmp_path), PARTS, torch.float32, 2)
    free.free = needed
    assert offload.on_nvme(str(tmp_path), PARTS, torch.float32, 2)["device"] == "nvme"


def test_what_is_missing_for_the_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose=False: False)
    monkeypatch.setattr(offload.shutil, "which", lambda name: None if name == "g++" else f"/bin/{name}")
    with pytest.raises(ValueError, match=r"needs DeepSpeed's operator async_io.*: libaio-dev, g\+\+ missing; install"):
        offload.on_nvme(str(tmp_path), PARTS, torch.float32, 2)


def test_every_rank_has_a_folder_of_its_own_with_room_for_the_largest_part(tmp_path: Path, ready: None) -> None:
    first, second = (offload.on_nvme(str(tmp_path), PARTS, torch.float32, 2) for _ in range(2))
    assert first["nvme_path"] != second["nvme_path"]
    assert {Path(item["nvme_path"]).parent for item in (first, second)} == {tmp_path}
    assert first["buffer_size"] == 500_000
    offload.delete(first["nvme_path"])
    assert [str(path) for path in tmp_path.iterdir()] == [second["nvme_path"]]


def test_the_folder_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from moe_steer.backends import offload; offload.compile_once = lambda: None; "
        "offload.refuse_without_compiler = lambda: None; "
        "print(offload.on_nvme(sys.argv[1], [300_000], torch.float32, 1)['nvme_path'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_deleted_and_nothing_else(tmp_path: Path, ready: None) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f"{offload._prefix()}{pid}-abc" for pid in (gone.pid, os.getpid())]
    others = ["zero3-another.machine-1-abc", "results"]
    for name in (*names, *others):
        (tmp_path / name).mkdir()
    made = Path(offload.on_nvme(str(tmp_path), PARTS, torch.float32, 1)["nvme_path"])
    assert {path.name for path in tmp_path.iterdir()} == {names[1], *others, made.name}
