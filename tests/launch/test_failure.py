"""Whose fault it was, in words, without a second process: the same functions that every rank runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import failure
from launch.failure import what_to_say
from launch.ranks import ranks_of_this_run
from launch.steer_r1 import main


class Store:
    """The note that the ranks share."""

    def __init__(self) -> None:
        self.note = ""

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        """As torch's TCPStore."""
        if self.note == expected:
            self.note = wanted
        return self.note.encode()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    return made


GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
GLOO_LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"


def test_the_first_rank_speaks_and_the_others_do_not(store: Store) -> None:
    first = what_to_say(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, 60)
    assert str(first) == "rank 1: CUDA out of memory. Tried to allocate"
    assert what_to_say(RuntimeError(GLOO_CLOSED), 0, 60) is None
    assert what_to_say(ValueError("there is no model"), 2, 60) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO_CLOSED), "rank 3 lost another rank, which was killed or whose node is gone"),
        (dist.DistBackendError("NCCL error: remote process exited"), "rank 3 lost another rank"),
        (RuntimeError(GLOO_LATE), "rank 3 waited 4 s for the other ranks in vain"),
        (MemoryError(), "rank 3: out of CPU memory: use a smaller --batch-size"),
        (OSError(28, "No space left on device"), "rank 3: [Errno 28] No space left on device"),
    ],
)
def test_what_each_failure_is_called(store: Store, error: BaseException, said: str) -> None:
    found = what_to_say(error, 3, 4)
    assert isinstance(found, RuntimeError)
    assert str(found).startswith(said)


def test_a_collective_that_broke_off_is_seen_through_the_error_around_it(store: Store) -> None:
    wrapped = ValueError("the model cannot be loaded")
    wrapped.__cause__ = RuntimeError(GLOO_CLOSED)
    assert "lost another rank" in str(what_to_say(wrapped, 0, 60))


def test_wrong_input_and_bugs_come_through_as_they_are(store: Store) -> None:
    for error in (ValueError("a wrong plan"), KeyError("bug"), KeyboardInterrupt()):
        store.note = ""
        assert what_to_say(error, 0, 60) is error


def test_a_rank_that_cannot_ask_speaks_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def gone() -> Any:
        raise dist.DistNetworkError("Connection reset")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    assert "lost another rank" in str(what_to_say(RuntimeError(GLOO_CLOSED), 1, 60))
    assert slept == [failure._GRACE]


def test_one_process_raises_what_it_raises() -> None:
    with pytest.raises(RuntimeError, match="^CUDA out of memory$"), ranks_of_this_run():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_wrong_usage_is_said_by_the_first_rank_alone(
    rank: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("launch.start.time.sleep", slept.append)
    with pytest.raises(SystemExit) as stopped:
        main(["--modle", "lab"])
    assert stopped.value.code == 2
    assert ("--modle" in capsys.readouterr().err) == speaks
    assert bool(slept) != speaks
