"""``GET /v1/steering``: what is served and what has fired. ``GET /v1/steering/requests/ID``: what one reply's samples have hit."""

from __future__ import annotations

import json
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

            worker = json.loads((await client.collective_rpc("steer_status"))[0])
            return JSONResponse(state_of(client.input_processor.steer_served, vllm.__version__, worker))

        async def steering_request(reply: str) -> Any:
            samples = json.loads((await app.state.steer_client.collective_rpc("steer_request", args=(reply,)))[0])
            if samples:
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
