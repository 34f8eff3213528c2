"""The lock of a compile: waited for while somebody compiles, deleted when nobody does."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from moe_steer.backends import offload


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """As torch makes it."""
    path = tmp_path / "async_io" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def make_old(lock: Path) -> None:
    """Nothing has been written for longer than anybody waits."""
    long_ago = time.time() - offload.GIVE_UP_S - 60
    for path in (lock, lock.parent):
        os.utime(path, (long_ago, long_ago))


def test_the_lock_of_a_killed_compile_is_deleted(lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_old(lock)
    offload._wait_for(lock)
    assert not lock.exists()
    assert capfd.readouterr().err == f"deleting {lock}, which a compile that was killed has left\n"


def test_a_lock_that_somebody_holds_is_not(lock: Path) -> None:
    make_old(lock)
    held = os.open(lock, os.O_RDONLY)
    try:
        with pytest.raises(
            ValueError, match=f"process {os.getpid()} has been compiling .* async_io .*10 minutes: end it"
        ):
            offload._wait_for(lock)
    finally:
        os.close(held)
    assert lock.exists()


def test_torch_holds_its_lock_open_while_it_compiles(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    assert offload._holder(tmp_path / "lock") == os.getpid()
    baton.release()
    (tmp_path / "lock").touch()
    assert offload._holder(tmp_path / "lock") is None


def test_another_compile_is_waited_for(lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.7, lock.unlink).start()
    started = time.monotonic()
    offload._wait_for(lock)
    assert time.monotonic() - started > 0.6
    assert capfd.readouterr().err == f"waiting for another compile of async_io; if there is none, delete {lock}\n"
