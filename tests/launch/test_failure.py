"""Whose fault it was, in words, without a second process: the same functions that every rank runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.core import failure
from launch.core.failure import error_to_report
from launch.core.ranks import Ranks, ranks_of_this_run, start, take_gpu
from launch.jobs.evaluation import EvaluateOptions
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
    first = error_to_report(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, 60)
    assert str(first).startswith("rank 1: out of GPU memory: use a smaller --batch-size; 'moe-steer memory' says")
    assert error_to_report(RuntimeError(GLOO_CLOSED), 0, 60) is None
    assert error_to_report(ValueError("there is no model"), 2, 60) is None


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
    found = error_to_report(error, 3, 4)
    assert isinstance(found, RuntimeError)
    assert str(found).startswith(said)


def test_a_collective_that_broke_off_is_seen_through_the_error_around_it(store: Store) -> None:
    wrapped = ValueError("the model cannot be loaded")
    wrapped.__cause__ = RuntimeError(GLOO_CLOSED)
    assert "lost another rank" in str(error_to_report(wrapped, 0, 60))


def test_wrong_input_and_bugs_come_through_as_they_are(store: Store) -> None:
    for error in (ValueError("a wrong plan"), KeyError("bug"), KeyboardInterrupt()):
        store.note = ""
        assert error_to_report(error, 0, 60) is error


def test_a_rank_that_cannot_ask_speaks_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def gone() -> Any:
        raise dist.DistNetworkError("Connection reset")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    assert "lost another rank" in str(error_to_report(RuntimeError(GLOO_CLOSED), 1, 60))
    assert slept == [failure._GRACE]


def test_one_process_raises_what_it_raises() -> None:
    with pytest.raises(RuntimeError, match="^no such kernel$"), ranks_of_this_run():
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "evaluate.py: out of GPU memory: use a smaller --batch-size",
        ),
        (MemoryError(), "evaluate.py: out of CPU memory: use a smaller --batch-size"),
    ],
)
def test_one_process_says_what_to_do_when_memory_is_short(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: EvaluateOptions, __: Ranks) -> None:
        raise error

    assert start(EvaluateOptions, run, [], program="evaluate.py") == 1
    assert capsys.readouterr().err.startswith(said)


def test_every_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_gpu(0)
    take_gpu(1)
    assert taken == [0, 1]
    with pytest.raises(ValueError, match="rank 2 of this machine has no GPU, there are 2: start at most 2 ranks here"):
        take_gpu(2)
    assert taken == [0, 1]


def test_the_gpu_is_taken_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would send from the first GPU for all ranks."""
    order: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("launch.core.ranks.take_gpu", lambda rank: order.append(f"gpu {rank}"))
    monkeypatch.setattr("launch.core.ranks.end_with_the_launcher", lambda: None)

    def meet(dist_backend: str, **_: Any) -> None:
        order.append(dist_backend)
        raise RuntimeError("far enough")

    monkeypatch.setattr("deepspeed.init_distributed", meet)
    with pytest.raises(RuntimeError, match="far enough"), ranks_of_this_run():
        pass
    assert order == ["gpu 1", "nccl"]


def test_an_infinite_machine_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(["--gpus", "1", "--gpu-gib", "inf", "--dry-run"])
    assert stopped.value.code == 2
    assert "--gpu-gib is inf: give a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_wrong_usage_is_said_by_the_first_rank_alone(
    rank: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("launch.core.ranks.time.sleep", slept.append)
    with pytest.raises(SystemExit) as stopped:
        main(["--modle", "lab"])
    assert stopped.value.code == 2
    assert ("--modle" in capsys.readouterr().err) == speaks
    assert bool(slept) != speaks
