"""Worker processes that can be killed, for graders that may never end.

Each worker is a new Python interpreter that is started by a command line and talks over pipes. It inherits nothing from this
process, so it works from any thread, in notebooks, under test runners and in scripts without a main guard. If a request takes
longer than its limit, its worker is killed; the next request starts a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

START_LIMIT = 120.0
"""Seconds for a worker to import its libraries; not counted against a request."""
_ROOT = str(Path(__file__).resolve().parents[2])
_PROGRAM = "import sys; sys.path[0] = sys.argv[1]; from reasoning_evals.grading.sympy_worker import serve; serve()"

_lock = threading.Lock()


class WorkerTimeout(Exception):
    """The request ran into its time limit and its worker was killed."""


class WorkerFailed(Exception):
    """The worker ended by itself, at its start or during the request."""


class WorkerPool:
    """Up to ``size`` worker processes, started when first needed. ``call`` may be used from any number of threads."""

    def __init__(self, size: int = 1) -> None:
        if size < 1:
            raise ValueError(f"workers is {size}: expected 1 or more")
        self.size = size
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def call(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The worker's reply. Raises WorkerTimeout after ``limit`` seconds, WorkerFailed when the worker dies."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():
                worker = _Worker()
            return worker.call(request, limit)
        except BaseException:
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def pids(self) -> list[int]:
        """Process ids of the idle workers: who supervises memory or tests a worker's death needs them."""
        workers = [worker for worker in list(self._idle.queue) if worker is not None and worker.alive()]
        return [worker.process.pid for worker in workers]

    def close(self) -> None:
        """End all workers; a later call starts new ones."""
        for _ in range(self.size):
            worker = self._idle.get()
            if worker is not None:
                worker.kill()
        for _ in range(self.size):
            self._idle.put(None)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, _ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C goes to the parent only, which then closes the pool
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.replies, selectors.EVENT_READ)
        self.buffer = b""
        try:
            self._reply(START_LIMIT)
        except BaseException:
            self.kill()
            raise

    def alive(self) -> bool:
        return self.process.poll() is None

    def call(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        try:
            self.requests.write(json.dumps({**request, "timeout": limit}).encode() + b"\n")
            self.requests.flush()
        except OSError as error:
            raise WorkerFailed(self._last_words()) from error
        return self._reply(limit)

    def _reply(self, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise WorkerTimeout(f"no result after {limit:g} s")
            chunk = os.read(self.replies.fileno(), 1 << 16)
            if not chunk:
                raise WorkerFailed(self._last_words())
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        lines = self.errors.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "nothing on its error output")
        return f"the grading process ended with code {self.process.returncode}: {said.strip()[:120]}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.requests, self.replies, self.errors):
            try:
                pipe.close()
            except OSError:  # closing flushes a request that the dead worker never read
                continue


_shared: list[WorkerPool] = []


def shared_pool() -> WorkerPool:
    """The pool of this process, for callers without their own."""
    with _lock:
        if not _shared:
            pool = WorkerPool(min(4, os.cpu_count() or 1))
            atexit.register(_close, pool, os.getpid())
            _shared.append(pool)
        return _shared[0]


def _close(pool: WorkerPool, owner: int) -> None:
    if os.getpid() == owner:
        pool.close()


def _forget() -> None:
    """A forked child must not write into its parent's pipes."""
    global _lock
    _lock = threading.Lock()
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
