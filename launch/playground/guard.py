"""Who may ask the playground: this machine's own page, or whoever has the token. And what a browser may do with the page."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

Message = MutableMapping[str, Any]
Asgi = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

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

    def __init__(self, app: Asgi, host: str, port: int, token: str | None) -> None:
        self._app, self._host, self._token = app, host, token
        self._cookie = f"moe-steer-{port}"

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket: nobody opens one here
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        if not self._knows(headers.get("host", "")):
            await _say(guarded, 421, "this address is not the playground's own: open the one that it has printed")
        elif scope["method"] not in ("GET", "HEAD") and (why := _foreign(headers)):
            await _say(guarded, 403, why)
        elif self._token is not None and not self._shows(headers):
            await self._ask(scope, guarded)
        else:
            await self._app(scope, receive, guarded)

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

    def _shows(self, headers: MutableMapping[str, str]) -> bool:
        bearer = headers.get("authorization", "")
        cookie = SimpleCookie()
        try:
            cookie.load(headers.get("cookie", ""))
        except Exception:  # what no browser sends
            return False
        given = bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else ""
        return self._is_token(given) or (self._cookie in cookie and self._is_token(cookie[self._cookie].value))

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self._token or "").encode())

    async def _ask(self, scope: Message, send: Any) -> None:
        """The token in the address becomes a cookie, and leaves the address."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token", "")
        if scope["method"] != "GET" or not self._is_token(given):
            await _say(send, 401, "this playground asks for a token: open the whole address that it has printed")
            return
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        where = "/?" + rest if rest else "/"
        cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SECONDS}"
        await _say(send, 303, "", {"location": where, "set-cookie": cookie})


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _foreign(headers: MutableMapping[str, str]) -> str:
    """Why a request that changes something does not come from the page itself; "" where it does."""
    site, origin, host = headers.get("sec-fetch-site"), headers.get("origin"), headers.get("host", "")
    if site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc.lower() != host.lower()):
        return "the request comes from another site's page: use the playground's own"
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "the request is not JSON: use the playground's own page"
    return ""


async def _say(send: Any, status: int, text: str, more: MutableMapping[str, str] | None = None) -> None:
    headers = {"content-type": "text/plain; charset=utf-8", **(more or {})}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text.encode()})
