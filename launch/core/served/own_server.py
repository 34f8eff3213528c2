"""``--engine vllm``: a server that the job starts for itself, on this machine, and that ends with it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.core.served.server_options import CONCURRENCY, EngineOptions
from moe_steer import SteeringPlan

if TYPE_CHECKING:
    from reasoning_evals.engines import Server

PLANS = "plans"
"""Where a run leaves the plans that a server has to have."""
LOG = "engine.log"
OWNER = "MOE_STEER_OWNER"
"""Environment: the process that the server is for; it ends when that one is gone, killed or not."""
_NEUTRAL = "neutral.json"
"""A plan that changes nothing: the plug-in serves plans, and answers how tokens were steered where it has one."""
_ENDS_WITHIN = 30.0
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:.*\] )?(\w+(?:Error|Exception): \S.*)$", re.MULTILINE)


@dataclass(kw_only=True)
class OwnServer:
    """``moe-steer serve`` in a process group of its own, on a free port of 127.0.0.1 that it keeps when it is started again."""

    options: EngineOptions
    model: str
    """What it is told to serve."""
    given: tuple[str, ...]
    """Options of the engine that the job's own say; those of ``--engine-options`` come after, and decide."""
    folder: Path
    """Of the run: its plans are served, and the engine's own words go to a file there."""
    say: Callable[[str], None]
    port: int = field(default_factory=lambda: _free_port())
    _process: subprocess.Popen[bytes] | None = None

    @property
    def reached(self) -> Server:
        """How it is asked."""
        from reasoning_evals.engines import Server

        return Server(base_url=self.address, concurrency=self.options.concurrency or CONCURRENCY)

    @property
    def address(self) -> str:
        """Up to ``/v1``."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def runs(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Serve the model with the plans of the run, as they are now; returns when it answers. RuntimeError, with where its words
        are, when it ends before."""
        self.stop()
        plans = self.folder / PLANS
        plans.mkdir(parents=True, exist_ok=True)
        if not any(plans.glob("*.json")):
            SteeringPlan().save(plans / _NEUTRAL)
        own = self.options
        command = [sys.executable, "-m", "launch.cli.main", "serve", self.model, "--plan", str(plans.resolve())]
        command += ["--port", str(self.port), *(("--python", own.engine_python) if own.engine_python else ())]
        command += ["--", *_with_gpus([*self.given, *shlex.split(own.engine_options or "")])]
        log = self.folder / LOG
        self.say(f"starting {own.engine} with {self.model}; what it says goes to {log}")
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, OWNER: str(os.getpid())},
            )
        while self._process.poll() is None and not steers(self.port):
            time.sleep(0.25)
        if self._process.poll() is not None:
            self._process = None
            raise RuntimeError(f"{own.engine} did not start: {_cause(log, before)} (all of it in {log})")

    def stop(self) -> None:
        """End it, and whatever it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_WITHIN)
        # The head of the group has ended; workers of the engine that outlive it would keep its memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def steers(port: int) -> bool:
    """Whether a server on 127.0.0.1 is up, and knows plans."""
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/steering", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _with_gpus(given: list[str]) -> list[str]:
    """The engine's options, over all GPUs that this start sees where they do not say how to spread the model."""
    import torch

    spreads = any(one.partition("=")[0].replace("_", "-").endswith(("-parallel-size", "-tp")) for one in given)
    number = torch.cuda.device_count() if torch.cuda.is_available() else 1
    return given if spreads or number < 2 else [*given, "--tensor-parallel-size", str(number)]


def _cause(log: Path, before: int) -> str:
    """The first error of the log behind ``before`` bytes: engines wrap it in others. Without one, the last line."""
    text = log.read_bytes()[before:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = _ERROR.search(text)
    return (found.group(1) if found else lines[-1] if lines else "it said nothing")[:300]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
