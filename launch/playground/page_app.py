"""The playground over HTTP: the page's files, what it may choose from, runs with their tokens as server-sent events, plans."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launch.core.levers.arm_words import RULES
from launch.playground.boards import Boards, Busy, Telling
from launch.playground.readings import colour_of
from launch.playground.repeating import Repeater
from moe_steer.errors import one_line
from moe_steer.json_files import parse_json
from moe_steer.tokens import SCOPES
from reasoning_evals.report.page import template_text

LARGEST = 1 << 20
"""Bytes of what a page may send."""
EVERY = 0.03
"""Seconds between two looks at what the columns have made."""
_KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_FILES = {
    "": "index.html",
    "playground.js": "playground.js",
    "tokens.js": "tokens.js",
    "playground.css": "playground.css",
}
_NOT_IN_COLUMNS = ("baseline", "plan", "preset", "exit")


def application(boards: Boards, repeater: Repeater, about: dict[str, Any]) -> Starlette:
    """The application. ``about``: what the page says of the model."""

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "")
        if name == "report.css":  # the look of the report
            return Response(template_text("style.css"), media_type=_KINDS["css"])
        if name not in _FILES:
            return JSONResponse({"error": f"there is no page {name[:60]!r} here"}, 404)
        content = resources.files("launch.playground").joinpath("page", _FILES[name]).read_text(encoding="utf-8")
        return Response(content, media_type=_KINDS[_FILES[name].rpartition(".")[2]])

    async def offer(_: Request) -> Response:
        return JSONResponse(about | offered(boards))

    async def problem(request: Request) -> Response:
        index = int(request.path_params["index"])
        if index >= len(boards.offer.problems):
            raise ValueError(
                f"problem {index + 1} does not exist: {boards.offer.task} has {len(boards.offer.problems)}"
            )
        one = boards.offer.problems[index]
        return JSONResponse({"id": one.problem_id, "prompt": one.prompt, "target": one.target, "domain": one.domain})

    async def read(request: Request) -> Response:
        board = boards.board(request.path_params["board"])
        return JSONResponse({"settings": board.settings, "ran": board.ran_with})

    async def keep(request: Request) -> Response:
        boards.keep(request.path_params["board"], await _body(request))
        return JSONResponse({})

    async def start(request: Request) -> Response:
        settings = await _body(request)
        await run_in_threadpool(boards.start, request.path_params["board"], settings)
        return JSONResponse({}, 202)

    async def stop(request: Request) -> Response:
        run = boards.board(request.path_params["board"]).run
        if run is not None:
            run.stop()
        return JSONResponse({})

    async def events(request: Request) -> Response:
        run = boards.board(request.path_params["board"]).run
        if run is None:
            raise ValueError("nothing has run on this page yet: press Run")
        words = request.query_params.get("colour", "")
        colour = colour_of(words, boards.offer.shape, list(boards.offer.directions)) if words else ()
        telling = Telling(boards, run, colour)

        async def told() -> AsyncIterator[str]:
            while True:
                ended = run.ended  # before the last look
                for one in telling.news():
                    yield f"data: {json.dumps(one, allow_nan=False)}\n\n"
                if ended or boards.ending:
                    break
                await asyncio.sleep(EVERY)
            yield "event: end\ndata: {}\n\n"

        return StreamingResponse(told(), media_type="text/event-stream")

    async def save(request: Request) -> Response:
        name, asked = request.path_params["board"], await _body(request)
        number = asked.get("column") if isinstance(asked, dict) else None
        settings = asked.get("settings") if isinstance(asked, dict) else None
        found = await run_in_threadpool(repeater.save, boards.place(name), boards.offer.read(settings), number)
        return JSONResponse(found._asdict())

    page = "/api/pages/{board}"
    routes = [
        Route("/", file), Route("/page/{name}", file), Route("/api/offer", offer), Route("/api/problems/{index:int}", problem),
        Route(page, read, methods=["GET"]), Route(page, keep, methods=["PUT"]), Route(page + "/run", start, methods=["POST"]),
        Route(page + "/stop", stop, methods=["POST"]), Route(page + "/events", events), Route(page + "/plan", save, methods=["POST"]),
    ]  # fmt: skip
    return Starlette(
        routes=routes,
        exception_handlers={
            Exception: _refusal,
            ValueError: _refusal,
            Busy: _refusal,
            RuntimeError: _refusal,
            OSError: _refusal,
        },
    )


def offered(boards: Boards) -> dict[str, Any]:
    """What the page lets one choose from."""
    offer = boards.offer
    shape = offer.shape
    served = {plan.name: len(plan.entries) for plan in offer.served.plans.values()} if offer.served else {}
    return {
        "remote": offer.remote,
        "shape": None if shape is None else shape.to_dict(),
        "scopes": [*SCOPES, "step_end:sentence", "step_end:paragraph", "after:64"],
        "plans": {name: plan.to_dict() | {"residual": len(plan.residual)} for name, plan in offer.plans.items()},
        "served": served,
        "directions": {
            name: {
                "layer": found.header.get("layer"),
                "unit": "residual_norm" if "residual_norm" in found.header else "vector",
            }
            for name, found in offer.directions.items()
        },
        "arms": [] if offer.remote else [text for name, text in RULES.items() if name not in _NOT_IN_COLUMNS],
        "task": offer.task,
        "problems": [f"{one.problem_id}" for one in offer.problems],
        "token_limit": offer.token_limit,
    }


async def _body(request: Request) -> Any:
    """What the page sent. ValueError for what is too long, or no JSON."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"the page sent more than {LARGEST} bytes: shorten the prompt")
        parts.append(part)
    return parse_json(b"".join(parts), "what the page sent", "reload the page")


async def _refusal(_: Request, error: Exception) -> Response:
    status = 409 if isinstance(error, Busy) else 400 if isinstance(error, ValueError) else 500
    return JSONResponse({"error": one_line(error)}, status)
