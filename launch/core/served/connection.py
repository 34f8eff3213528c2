"""A server that answers for the model: which of its plans are the arms of a job, and what to start where it lacks one.

``--engine vllm``: a server that the job starts for itself, on this machine, and that ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.core.served.server_options import CONCURRENCY, OWNER, EngineOptions, JobServerOptions, steers
from moe_steer import SteeringPlan
from reasoning_evals.engines import OFF, HttpAudit, HttpSampler, Served, ServedPlan, Server
from reasoning_evals.engines.http_reply import EndpointError
from reasoning_evals.engines.http_traffic import Traffic
from reasoning_evals.runs import Arm

PLANS = "plans"
"""Where a run leaves the plans that a server has to have."""
LOG = "engine.log"
_NEUTRAL = "neutral.json"
"""A plan that changes nothing: the plug-in serves plans, and answers how tokens were steered where it has one."""
_ENDS_WITHIN = 30.0
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:.*\] )?(\w+(?:Error|Exception): \S.*)$", re.MULTILINE)


@dataclass(kw_only=True)
class Connection:
    """A server that was reached. ``name``: what it calls the model. ``known``: its plans; None where it knows none. ``own``: the
    server itself, where this start runs it: it is started once something is asked, and again for plans that it lacks."""

    server: Server
    name: str
    known: Served | None = None
    own: OwnServer | None = None

    def __post_init__(self) -> None:
        self._traffic = Traffic(self.server.concurrency)  # of all arms together

    @classmethod
    def to(cls, options: JobServerOptions) -> Connection:
        """Reach the server of the options, and learn what it serves."""
        server = options.server_of()
        names = server.names()
        name = options.served_name or names[0]
        if name not in names or (options.served_name is None and len(names) > 1):
            raise ValueError(f"{options.endpoint} serves {', '.join(names[:8])}: name one with --served-name")
        return cls(server=server, name=name, known=server.served())

    @property
    def served(self) -> Served | None:
        """The plans that it knows; None where it knows of none."""
        if self.own is not None and not self.own.runs:
            self.own.start()
            self.known = self.server.served()
            self.own.say(self.line)
        return self.known

    @property
    def engine(self) -> dict[str, Any]:
        """What the server says of itself."""
        return dict(self.served.engine) if self.served else {}

    @property
    def line(self) -> str:
        """The server in words."""
        said = " ".join(str(value) for value in self.engine.values())
        plans = "no steering plans" if self.served is None else f"{len(self.served.plans)} steering plans"
        return f"server: {self.name}, {said + ', ' if said else ''}{plans}"

    def asked(self, plan: SteeringPlan | None) -> ServedPlan | None:
        """What a request names; None on a server that has no names for plans. ``plan``: one that ``require`` let pass."""
        if self.served is None:
            return None
        return OFF if plan is None else self.served.plans[plan.digest()]

    def sampler(self, tokenizer: Any, asked: ServedPlan | None, **how: Any) -> HttpSampler:
        """What asks the server, under a plan that it knows. ``how``: options of ``HttpSampler`` for servers that are asked otherwise."""
        return HttpSampler(
            self.server.base_url,
            self.name,
            tokenizer,
            concurrency=self._traffic,
            api_key=self.server.api_key,
            plan=asked,
            outage=self.server.wait,
            **{"prompt_as_ids": True, "engine": self.engine, **how},
        )

    def arm(self, name: str, tokenizer: Any, plan: SteeringPlan | None, **how: Any) -> Arm:
        """The model under one of the server's plans, or as it is. The same arm as in this process, but for who samples. ``how``:
        see ``sampler``."""
        sampler = self.sampler(tokenizer, self.asked(plan), **how)
        details = {"plan": plan.digest() if plan else None}
        return Arm(name, sampler, context=lambda: HttpAudit(sampler), details=details)

    def require(self, plans: Mapping[str, SteeringPlan | None], folder: Path, model: str) -> None:
        """See ``Session.require``. A server of this start is started again with the plans that it lacks."""
        needed = {name: plan for name, plan in plans.items() if plan is not None}
        for plan in needed.values():
            plan.refuse_outside("a server")
        fresh = self.own is not None and not self.own.runs  # its plans are read when it starts
        if not needed or not (fresh or self._missing(needed)):
            return
        home = folder / PLANS
        home.mkdir(parents=True, exist_ok=True)
        for name, plan in needed.items():
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
            plan.with_files(lambda path: os.path.relpath(path, home), home).save(home / f"{stem}.json")
        if self.own is not None:
            self.own.stop()
        self.refuse_missing(needed, model, str(home))

    def refuse_missing(self, plans: Mapping[str, SteeringPlan], model: str, source: str) -> None:
        """ValueError, with the command that starts the right server, where it lacks one of the plans; ``source``: their file or
        folder."""
        missing = self._missing(plans)
        if not missing:
            return
        lacks = (
            "takes no steering plans (GET /v1/steering names none), and would ignore them without a word"
            if self.served is None
            else f"does not have the plan of {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
        raise ValueError(
            f"the server at {self.server.base_url} {lacks}: start it with 'moe-steer serve {model} --plan {source}', then this again"
        )

    def _missing(self, plans: Mapping[str, SteeringPlan]) -> list[str]:
        known = self.served.plans if self.served else {}
        return [name for name, plan in plans.items() if plan.digest() not in known]


def plans_of_any(server: Server) -> Served | None:
    """The plans of a server that need not know what plans are, hosted ones included. Where it does, a default of its own must be
    switched off in an unsteered arm."""
    if server.wait:
        server.names()
    try:
        return dataclasses.replace(server, wait=0.0).served()
    except EndpointError:
        return None


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
