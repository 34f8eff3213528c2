"""Start a script on several ranks, with a hard limit of time; nothing is left running, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(sys.executable).with_name("deepspeed")
_server: subprocess.Popen[bytes] | None = None


class Finished(NamedTuple):
    """Exit codes by rank (None: killed at the limit), everything printed, seconds."""

    codes: list[int | None]
    text: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """The environment of every rank: one thread, no network, no GPU."""
    paths = [ROOT, ROOT / "tests" / "moe_steer", ROOT / "tests" / "launch"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",  # a native crash says where it was
        **more,
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    script: Path, num_ranks: int, arguments: Sequence[str], limit: float, runs: Sequence[str] = (), **more: str
) -> Finished:
    """Run ``script`` on every rank at once; when one fails, the others are killed 5 s later; at ``limit`` seconds all are.
    ``runs``: the last argument of each of several runs, which take place side by side, each with ranks of its own.
    ``more``: of the environment."""
    return RunningRanks(script, num_ranks, arguments, runs, **more).wait(limit)


def launch(arguments: Sequence[str], limit: float, **more: str) -> Finished:
    """The launcher that users start, with its exit code alone; its whole process group is killed at the limit."""
    began = time.monotonic()
    process = start_launcher(arguments, subprocess.PIPE, **more)
    code: int | None = None
    try:
        text, _ = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return Finished([code], text, time.monotonic() - began)


def start_launcher(arguments: Sequence[str], output: Any, **more: str) -> subprocess.Popen[str]:
    """``deepspeed`` with these arguments on a port of its own, as the head of a process group."""
    return subprocess.Popen(
        [str(LAUNCHER), "--master_port", str(free_port()), *arguments],
        env=environment(PATH=f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}", **more),
        cwd=ROOT,
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # a shell starts what it runs in the background with Ctrl-C ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


class RunningRanks:
    """A script that has been started on every rank, by the server of ``rank_server.py``; one start at a time, which may be of
    several runs: their ranks are numbered on here."""

    def __init__(
        self, script: Path, num_ranks: int, arguments: Sequence[str], runs: Sequence[str] = (), **more: str
    ) -> None:
        self._logs = tempfile.TemporaryDirectory()
        self._started = time.monotonic()
        jobs: list[dict[str, Any]] = []
        for last in [[run] for run in runs] or [[]]:
            port = str(free_port())
            for rank in range(num_ranks):
                env = environment(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_SIZE=str(num_ranks),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **more,
                )  # fmt: skip
                jobs.append(
                    {
                        "script": str(script),
                        "arguments": [*arguments, *last],
                        "environment": env,
                        "folder": str(ROOT),
                        "log": self._log(len(jobs)),
                    }
                )
        self._server = _running_server()
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(jobs).encode() + b"\n")
        self._server.stdin.flush()
        self.pids: list[int] = self._answer(300)  # the first answer waits for the server's imports
        assert self.pids, "the server that starts ranks has not answered within 300 s"

    def kill(self) -> Finished:
        """Kill all ranks now, as a machine that goes down does."""
        return self.wait(0)

    def wait(self, limit: float) -> Finished:
        """Until all ranks have ended, or ``limit`` seconds after the start; nothing runs any more afterwards."""
        codes: list[int | None] = [None] * len(self.pids)
        ended = 0
        deadline = self._started + limit
        try:
            while ended < len(codes) and (answer := self._answer(deadline - time.monotonic())):
                codes[answer[0]] = answer[1]
                ended += 1
                if answer[1]:
                    deadline = min(deadline, time.monotonic() + 5)
        finally:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            for _ in range(len(codes) - ended):
                self._answer(60)
        text = "\n".join(f"[rank {i}] {Path(self._log(i)).read_text(errors='replace')}" for i in range(len(codes)))
        return Finished(codes, text, time.monotonic() - self._started)

    def _log(self, rank: int) -> str:
        return os.path.join(self._logs.name, f"rank{rank}")

    def _answer(self, patience: float) -> Any:
        """The server's next line; None when it says nothing for so many seconds."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], max(0.0, patience))[0]:
            return None
        return json.loads(self._server.stdout.readline())


def _running_server() -> subprocess.Popen[bytes]:
    """The server of this process, started when the first ranks are."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "launch" / "rank_server.py")],
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that what select sees is all there is
        )
    return _server


def stop_server() -> None:
    """Let the server end, if one was started."""
    global _server
    if _server is not None:
        _server.communicate()
        _server = None
