"""What a server is, asked once: whether it is up, what it calls its model, which steering plans it knows; and replies in one piece.

A plan is named in a request's ``vllm_xargs``. A server without the plug-in takes that field and ignores it, so nothing is asked
under a plan before ``GET /v1/steering`` has said that the server has it, by the digest of what the plan does.
"""

from __future__ import annotations

import asyncio
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx

from moe_steer.json_files import NotJSON, check_types, parse_json, quoted
from reasoning_evals.engines.http_client import Address, fetch, open_client, raise_status
from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, short

T = TypeVar("T")
_STEERING = "/steering"
_MOST = 1 << 24
"""Bytes of what a server says of itself."""
_AGAIN = "this is no server of this protocol, or another version of its plug-in"


class ServedPlan(NamedTuple):
    """A steering plan on a server. ``name``: what a request calls it. ``entries``: what its counts belong to, as audit rows."""

    name: str
    digest: str = ""
    entries: tuple[Mapping[str, Any], ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """What a request says."""
        return {"vllm_xargs": {"moe_steer": self.name}}


OFF = ServedPlan("off")
"""The model as it is, on a server that may have a plan as its default."""


class Served(NamedTuple):
    """What a server with the plug-in says of itself."""

    engine: Mapping[str, Any]
    """Engine, version, version of the plug-in."""
    plans: Mapping[str, ServedPlan]
    """Digest -> plan."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server at ``base_url`` (up to ``/v1``). ``wait``: seconds that it may be away, now or later. ``concurrency``: requests
    under way at once. ``patience``: seconds without a byte."""

    base_url: str
    api_key: str | None = None
    wait: float = 0.0
    concurrency: int = 64
    patience: float = 600.0

    def names(self) -> list[str]:
        """What the models are called in requests, once the server is up. EndpointError when it does not come."""
        (said,) = self._ask_all("/models", [None], self.wait, _MOST)
        values = self._read(said, "/models")
        named = {"data": values} if isinstance(values, list) else values  # Together leaves the object out
        rows = self._checked(named, "/models", {"data": list}).get("data", [])
        found = [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
        if not found:
            raise EndpointError(f"{self._shown('/models')}: it names no model: {_AGAIN}")
        return list(dict.fromkeys(found))

    def served(self) -> Served | None:
        """The plans it knows; None where it does not know the field, as any server without the plug-in."""
        try:
            (said,) = self._ask_all(_STEERING, [None], self.wait, _MOST)
            values = self._read(said, _STEERING)
        except (_Missing, _NoJSON):
            return None
        if isinstance(values, dict) and not {"version", "plans"} & {*values}:  # LM Studio answers 200 to anything
            return None
        kinds = {"version": int, "server": dict, "plans": dict}
        values = self._checked(values, _STEERING, kinds)
        if values.get("version") != 1 or not kinds.keys() <= values.keys():
            raise EndpointError(
                f"{self._shown('/steering')}: version {quoted(values.get('version'))} of the answer: {_AGAIN}"
            )
        plans = {}
        for name, plan in values["plans"].items():
            about = self._checked(plan, _STEERING, {"digest": str, "entries": list[dict]})
            if not {"digest", "entries"} <= about.keys():
                raise EndpointError(
                    f"{self._shown('/steering')}: it does not say what its plan {quoted(name)} is: {_AGAIN}"
                )
            plans[about["digest"]] = ServedPlan(name, about["digest"], tuple(about["entries"]))
        return Served(values["server"], plans)

    def complete(self, bodies: Sequence[Mapping[str, Any]], most: int) -> Iterator[dict[str, Any]]:
        """The replies to requests for completions, in one piece each and in order; ``most``: bytes of one. EndpointError in one
        line for the first that fails for good."""
        for start in range(0, len(bodies), self.concurrency):  # so many replies are held at once
            for said in self._ask_all("/completions", bodies[start : start + self.concurrency], self.wait, most):
                yield self._checked(self._read(said, "/completions"), "/completions", {"choices": list[dict]})

    def _ask_all(self, path: str, bodies: Sequence[Mapping[str, Any] | None], wait: float, most: int) -> list[bytes]:
        address = Address(self.base_url, path, self.api_key)

        async def one(client: httpx.AsyncClient, body: Mapping[str, Any] | None) -> bytes:
            async def once() -> bytes:
                status, phrase, said = await fetch(client, address.url, most, body)
                nowhere = (
                    404,
                    405,
                    501,
                    *((400, 403) if path == _STEERING else ()),
                )  # gateways say so of what they do not know
                if status in nowhere and body is None:  # no such place, or none to look at
                    raise _Missing(f"{address.shown} answers {status}: give an address up to /v1")
                if status != 200:
                    raise_status(status, phrase, said.decode(errors="replace"), hide=address.hide)
                return said

            try:
                return await until(once, wait)
            except _Missing:
                raise
            except (EndpointError, httpx.HTTPError) as error:
                raise EndpointError(f"{address.shown}: {short(address.hide(str(error)), 600)}") from None

        async def everything() -> list[bytes]:
            async with open_client(address, self.concurrency, self.patience) as client:
                return await asyncio.gather(*(one(client, body) for body in bodies))

        with ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own in this thread
            return pool.submit(asyncio.run, everything()).result()

    def _read(self, said: bytes, path: str) -> Any:
        try:
            return parse_json(said, self._shown(path), _AGAIN, surrogates=True)
        except ValueError as error:
            kind = _NoJSON if isinstance(error, NotJSON) else EndpointError
            raise kind(short(str(error), 600)) from None

    def _checked(self, values: Any, path: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise EndpointError(f"{self._shown(path)}: it answers {quoted(values)}: {_AGAIN}")
        try:
            return check_types(values, self._shown(path), kinds)
        except ValueError as error:
            raise EndpointError(short(str(error), 600)) from None

    def _shown(self, path: str) -> str:
        return Address(self.base_url, path, self.api_key).shown


class _Missing(EndpointError):
    """There is nothing at this address."""


class _NoJSON(EndpointError):
    """It answers something else: a page, or nothing."""


async def until(once: Callable[[], Any], wait: float) -> Any:
    """``once`` again and again while it fails in passing; EndpointError after ``wait`` seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            return await once()
        except PassingFailure as failure:
            if time.monotonic() >= end:
                more = f" for {wait:g} s" if wait else ""
                raise EndpointError(
                    f"{failure}{more}: see whether the server is up and its log; --wait-server SECONDS waits for one that starts"
                ) from failure
            await asyncio.sleep(min(1.0, max(0.05, end - time.monotonic())))


async def fired(
    client: httpx.AsyncClient, address: Address, plan: ServedPlan, request_id: str | None
) -> list[int] | None:
    """Tokens at which each entry of the plan acted in one request, by the server's word; None where it no longer knows."""
    if request_id is None:
        return None
    url = address.at(f"/steering/requests/{urllib.parse.quote(request_id, safe='')}")
    status, phrase, said = await fetch(client, url, 1 << 20)
    if status == 404:  # the request is older than those that it keeps
        return None
    if status != 200:
        raise_status(status, phrase, said.decode(errors="replace"), hide=address.hide)
    return hits_of(said, plan)


def hits_of(said: bytes, plan: ServedPlan) -> list[int]:
    """What a server says of one request; EndpointError where it steered otherwise than it was asked to."""
    try:
        values = parse_json(said, "its audit of a request", _AGAIN)
        if not isinstance(values, dict) or not isinstance(values.get("samples"), list) or len(values["samples"]) != 1:
            raise ValueError(f"its audit of a request is {quoted(values)}: {_AGAIN}")
        sample = check_types(values["samples"][0], "its audit of a request", {"hits": list[int], "plan": str | None})
    except ValueError as error:
        raise EndpointError(short(str(error), 600)) from None
    name = plan.name.partition("*")[0]
    if sample.get("plan") != name:
        raise EndpointError(
            f"it was asked for the plan {plan.name!r} and says that it ran {quoted(sample.get('plan'))}: {_AGAIN}"
        )
    hits = sample.get("hits", [])
    if len(hits) != len(plan.entries) or min(hits, default=0) < 0:
        raise EndpointError(
            f"it counts {quoted(hits)} for the {len(plan.entries)} entries of the plan {name!r}: {_AGAIN}"
        )
    return list(hits)
