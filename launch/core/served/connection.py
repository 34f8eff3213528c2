"""A server that answers for the model: which of its plans are the arms of a job, and what to start where it lacks one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.core.served.own_server import PLANS, OwnServer
from launch.core.served.server_options import JobServerOptions
from moe_steer import SteeringPlan
from reasoning_evals.engines import OFF, HttpAudit, HttpSampler, Served, ServedPlan, Server
from reasoning_evals.engines.http_reply import EndpointError
from reasoning_evals.engines.http_traffic import Traffic
from reasoning_evals.runs import Arm


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

    @classmethod
    def with_own(cls, own: OwnServer) -> Connection:
        """The connection to a server that this start runs."""
        return cls(server=own.reached, name=own.model, own=own)

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
            "takes no steering plans (GET /v1/steering answers 404), and would ignore them without a word"
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
