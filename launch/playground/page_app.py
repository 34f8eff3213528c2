"""The playground over HTTP: the page's files, what it may choose from, runs with their tokens as server-sent events, plans.

Who may ask it: this machine's own page, or whoever has the token. And what a browser may do with the page.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import socket
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.core.levers.arm_words import RULES
from launch.playground.boards import Boards, Busy, Repeater, Telling
from launch.playground.readings import colour_of
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
        exception_handlers=dict.fromkeys((Exception, ValueError, Busy, RuntimeError, OSError), _refusal),
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


HEADERS = {
    # The page's own script and style alone: text that a model writes can neither run nor load anything.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
SECONDS = 30 * 24 * 3600
"""How long a browser keeps the token."""


class Guard:
    """ASGI middleware. ``token``: None where everyone on this machine may ask."""

    def __init__(self, app: ASGIApp, host: str, port: int, token: str | None) -> None:
        self._app, self._host, self._token = app, host, token
        self._cookie = f"moe-steer-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # a WebSocket: nobody opens one here

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._refused(Request(scope)) or self._app)(scope, receive, guarded)

    def _refused(self, request: Request) -> Response | None:
        """The answer in place of the page's; None where the page may answer."""
        if not self._knows(request.headers.get("host", "")):
            return PlainTextResponse("this address is not the playground's own: open the one that it has printed", 421)
        if request.method not in ("GET", "HEAD") and (why := _foreign(request.headers)):
            return PlainTextResponse(why, 403)
        return None if self._token is None or self._shows(request) else self._ask(request)

    def _knows(self, host: str) -> bool:
        """Whether a Host header names this server and not a name that somebody else points here (DNS rebinding)."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in ("localhost", self._host.lower()):
            return True
        local = is_local(self._host)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:  # a name: of a server that listens for others, this machine's own
            return not local and name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return address.is_loopback or not local

    def _shows(self, request: Request) -> bool:
        bearer = request.headers.get("authorization", "")
        given = bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else ""
        return self._is_token(given) or self._is_token(request.cookies.get(self._cookie, ""))

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self._token or "").encode())

    def _ask(self, request: Request) -> Response:
        """The token in the address becomes a cookie, and leaves the address."""
        if request.method != "GET" or not self._is_token(request.query_params.get("token", "")):
            return PlainTextResponse(
                "this playground asks for a token: open the whole address that it has printed", 401
            )
        rest = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "token"])
        cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SECONDS}"
        return RedirectResponse("/?" + rest if rest else "/", 303, {"set-cookie": cookie})


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _foreign(headers: Headers) -> str:
    """Why a request that changes something does not come from the page itself; "" where it does."""
    site, origin, host = headers.get("sec-fetch-site"), headers.get("origin"), headers.get("host", "")
    if site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc.lower() != host.lower()):
        return "the request comes from another site's page: use the playground's own"
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "the request is not JSON: use the playground's own page"
    return ""
