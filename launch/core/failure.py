"""When one of several ranks fails: the first cause is printed once, by the rank that had it, and nobody stays behind.

The others fail too, a moment later, in whatever collective they wait in; what they would say hides the cause. So the ranks share a
note in the store that they met at: who writes it first may speak.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from moe_steer.errors import one_line

OUT_OF_MEMORY = "out of CPU memory: use a smaller --batch-size, or fewer ranks on one machine"
OUT_OF_GPU_MEMORY = (
    "out of GPU memory: use a smaller --batch-size; 'moe-steer memory' says which backend and how many GPUs do"
)
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
_NOTE = "moe_steer/first_cause"
_GRACE = 3.0
"""Seconds for the launcher to end a rank that cannot ask who failed first; after them it speaks."""
_LOOK_EVERY = 1.0


class DryRun(Exception):
    """The end of a start that was asked to load nothing; its text says what it would have done."""


def error_to_report(error: BaseException, rank: int, waited: float) -> BaseException | None:
    """The error that this rank reports, in words of its own where another rank is behind it; None: another rank has spoken.

    ``waited``: seconds after which a collective gives up.
    """
    behind = _collective_failure(error)
    if behind and "timed out" in behind.lower():
        error = RuntimeError(
            f"rank {rank} waited {waited:g} s for the other ranks in vain: one hangs, or has much more to do "
            "(MOE_STEER_WAIT_SECONDS sets how long to wait); what was sampled is kept"
        )
    elif behind:
        error = RuntimeError(
            f"rank {rank} lost another rank, which was killed or whose node is gone; what was sampled is kept"
        )
    elif isinstance(error, (RuntimeError, MemoryError, OSError)):
        error = RuntimeError(f"rank {rank}: {in_words(error)}")
    return error if _first(rank) else None


def in_words(error: BaseException) -> str:
    """The message of an error in one line; of one that says only that memory is short, what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_GPU_MEMORY
    return OUT_OF_MEMORY if isinstance(error, MemoryError) else one_line(error)


def _first(rank: int) -> bool:
    """Whether no rank has spoken before."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set(_NOTE, "", str(rank)).decode() == str(rank)
    except (RuntimeError, ValueError, AttributeError):  # the rank that keeps the store is gone
        time.sleep(_GRACE)
        return True


def failure_is_reported() -> bool:
    """Whether a rank, on whatever node, has said why the run ends."""
    return bool(dist.distributed_c10d._get_default_store().check([_NOTE]))


def _collective_failure(error: BaseException) -> str:
    """What a collective said, when ``error`` or what it came from is one that broke off; "" for errors of this rank's own."""
    for link in _chain(error):
        text = str(link)
        ours = isinstance(link, dist.DistError) or "/gloo/" in text or "ProcessGroup" in text
        if ours and isinstance(link, RuntimeError):
            return text
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def end_with_the_launcher() -> None:
    """End this process, and the others of its node, when the launcher that the user started is gone.

    ``deepspeed`` starts a second process, which starts the ranks; a signal to the first alone would leave all others behind.
    """
    if "CROSS_SIZE" in os.environ and os.getppid() > 1 and Path("/proc/self/stat").exists():
        parent = os.getppid()
        threading.Thread(target=_watch, args=(parent, _parent_of(parent)), daemon=True).start()


def _watch(parent: int, launcher: int) -> None:
    while os.getppid() == parent and _parent_of(parent) == launcher:
        time.sleep(_LOOK_EVERY)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("the launcher is gone: stopped; what was sampled is kept", file=sys.stderr, flush=True)
    if os.getppid() == parent:
        os.kill(parent, signal.SIGTERM)  # it ends the ranks that it started
    os._exit(1)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def in_own_words(text: str, rows: int) -> str:
    """Advice about memory with the names of the options of a job."""
    from moe_steer.backends import FEWER

    return text.replace(
        FEWER, "a smaller --max-new-tokens" if rows == 1 else "a smaller --batch-size or --max-new-tokens"
    )
