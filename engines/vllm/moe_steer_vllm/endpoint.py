"""``GET /v1/steering``: what is served and what has fired. ``GET /v1/steering/requests/ID``: what one reply's samples have hit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from moe_steer_vllm.plugin import state_of


class SteeringEndpoint:
    """vLLM loads it where VLLM_PLUGINS names it."""

    name = "moe_steer"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the two routes."""
        from fastapi.responses import JSONResponse

        async def steering() -> Any:
            client = app.state.steer_client
            import vllm

            worker = summed(await of_engines(client, "steer_status"))
            return JSONResponse(state_of(client.input_processor.steer_served, vllm.__version__, worker))

        async def steering_request(reply: str) -> Any:
            samples = [
                one for found in await of_engines(app.state.steer_client, "steer_request", reply) for one in found
            ]
            if samples:
                samples.sort(key=lambda one: (one["prompt"], one["sample"]))
                return JSONResponse({"version": 1, "id": reply, "samples": samples})
            message = (
                "no steered request of that id is known: it was not steered, is of another server, or was long ago"
            )
            return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, status_code=404)

        app.add_api_route("/v1/steering", steering, methods=["GET"])
        app.add_api_route("/v1/steering/requests/{reply}", steering_request, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine's client for the routes."""
        state.steer_client = engine_client


async def of_engines(client: Any, method: str, *args: Any) -> list[Any]:
    """What the first worker of each data-parallel engine answers. (vLLM's own ``collective_rpc`` asks all of them, and hands on what
    the first one says.)"""
    core = client.engine_core
    asked = (
        core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)
        for engine in core.core_engines
    )
    return [json.loads(workers[0]) for workers in await asyncio.gather(*asked)]


def summed(workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of several engines, each of which answered requests of its own, as that of one."""
    first = workers[0]
    counts = {}
    for name in first["counts"]:
        said = [worker["counts"][name] for worker in workers]
        hits = [sum(column) for column in zip(*(one["hits"] for one in said), strict=True)]
        counts[name] = {"hits": hits, "tokens": sum(one["tokens"] for one in said)}
    return {**first, "counts": counts}
