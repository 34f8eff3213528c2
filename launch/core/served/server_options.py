"""Options of programs that may ask a server in place of loading the model; and what a server that a job has started shares with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from launch.core.option_checks import ASKED, ENDPOINT, ENGINE

if TYPE_CHECKING:
    from reasoning_evals.engines import Server

CONCURRENCY = 64
"""Requests under way at an endpoint at once."""
OWNER = "MOE_STEER_OWNER"
"""Environment: the process that the server is for; it ends when that one is gone, killed or not."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Whom to ask, where a server holds the model."""

    endpoint: str | None = None
    """Sample from a server with OpenAI's completions (vLLM, SGLang, llama.cpp, ...) at http://HOST:8000/v1 instead of loading the model."""
    wait_server: Annotated[float, ENDPOINT] = 0.0
    """Seconds to wait for the endpoint, at the start and whenever it is away; default not at the start, and six attempts of a sample."""
    concurrency: Annotated[int | None, ASKED] = None
    """Requests under way at the endpoint at once; default 64."""
    api_key_variable: Annotated[str | None, ENDPOINT] = None
    """Name of the environment variable that holds the endpoint's key."""

    @property
    def held_by(self) -> str:
        """See ``HeldModel``, in front of which this class stands."""
        return "endpoint" if self.endpoint else ""

    def server_of(self) -> Server:
        """The server of --endpoint. ValueError for a key that is not there; a text that may be the key itself, given in place of its
        variable's name, is not shown."""
        from reasoning_evals.engines import Server

        assert self.endpoint is not None
        key = None
        if (name := self.api_key_variable) is not None and not (key := os.environ.get(name, "").strip()):
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,59}", name):
                raise ValueError(
                    "--api-key-variable names no environment variable that is set: give the variable's name, not the key"
                )
            raise ValueError(f"the environment variable {name} is empty: put the endpoint's key there")
        return Server(
            base_url=self.endpoint, api_key=key, wait=self.wait_server, concurrency=self.concurrency or CONCURRENCY
        )


@dataclass(frozen=True, kw_only=True)
class JobServerOptions(ServerOptions):
    """The same for a job, which names its model by the folder or hub id."""

    served_name: Annotated[str | None, ENDPOINT] = None
    """What the endpoint calls the model, where it serves several."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions(JobServerOptions):
    """The same for a job that may start the server itself."""

    engine: Literal["vllm"] | None = None
    """Start a server of this engine with the model and the plans of the run, on the GPUs of this start, sample from it, and end it."""
    engine_python: Annotated[str | None, ENGINE] = None
    """Interpreter of the environment with vllm and moe-steer-vllm; default this one."""
    engine_options: Annotated[str | None, ENGINE] = None
    """Options of the engine in one text, as --engine-options='--dtype float32 --max-model-len 8192'."""

    @property
    def held_by(self) -> str:
        """See ``HeldModel``."""
        if self.endpoint and self.engine:
            raise ValueError("--endpoint is a server that runs, and --engine starts one: give one of them")
        return "engine" if self.engine else super().held_by


def steers(port: int) -> bool:
    """Whether a server on 127.0.0.1 is up, and knows plans."""
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/steering", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
