"""One request to an endpoint: where it goes, with which secret, and how much of an answer is read.

Written on httpx, not on a vendor's client: those read lines and events of any length, retry unseen by the audit, and quote
addresses and answers at length in their errors. What they would save is the joining of paths.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NoReturn

import httpx

from reasoning_evals.engines.http_reply import PASSING, EndpointError, PassingFailure, Reply, short, wait_of

_LONG = 8
"""A secret of so many characters is no word that a text might hold by chance."""
_MOST_OF_A_REFUSAL = 1 << 16
_NO_TLS = {
    "CERTIFICATE_VERIFY_FAILED": "name the file of the certificate to trust in the environment, as SSL_CERT_FILE",
    "WRONG_VERSION_NUMBER": "it speaks no TLS, give an address that starts with http://",
}
_LINE_END = re.compile(rb"\r\n|\r|\n")
_STREAMS = re.compile(r"text/html|xml|image/|video/|audio/|application/pdf")


class Address:
    """Where requests go. User and password of the address, and the key, become a header and are shown nowhere.

    ValueError, which quotes neither, for an address or a key that cannot be used.
    """

    def __init__(self, base_url: str, path: str, api_key: str | None) -> None:
        base_url = base_url.strip()
        shown = _without_secrets(base_url)
        if not base_url.lower().startswith(("http://", "https://")):
            raise ValueError(
                f"base_url must start with http:// or https://, got {shown!r}: such as http://HOST:8000/v1"
            )
        try:
            url = httpx.URL(base_url)
        except (httpx.InvalidURL, UnicodeError):
            url = httpx.URL()
        if not url.host or (url.port or 0) > 65535:
            raise ValueError(f"base_url {shown!r} is not a URL: give one such as http://HOST:8000/v1")
        if "?" in base_url or "#" in base_url:
            raise ValueError(
                f"base_url {shown!r} has a part behind ? or #: give the address up to /v1, a key as api_key"
            )
        self.headers = {"Accept-Encoding": "identity"}
        self._secrets: set[str] = set()
        if url.userinfo:
            if api_key is not None:
                raise ValueError(
                    f"base_url {shown!r} holds a user or a password, and api_key is given: give one of them"
                )
            token = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
            self.headers["Authorization"] = f"Basic {token}"
            self._secrets = {url.username, url.password, url.userinfo.decode(), token}
            url = url.copy_with(username="", password="")
        elif api_key is not None:
            key = _checked_key(api_key)
            self.headers["Authorization"] = f"Bearer {key}"
            self._secrets = {key}
        self._base = re.sub(r"(/chat)?/completions$", "", str(url).rstrip("/"))
        self.url = self.at(path)
        self.shown = _without_secrets(self.url)
        self.is_near = url.scheme == "http" and bool(re.fullmatch(r"localhost|127(\.\d+){3}|0\.0\.0\.0|::1?", url.host))
        """Whether the server is on this machine."""

    def at(self, path: str) -> str:
        """Another place of the same server."""
        return self._base + path

    def hide(self, text: str) -> str:
        """A text from outside without the secrets: servers repeat keys in what they complain about."""
        for secret in sorted(filter(None, self._secrets), key=len, reverse=True):
            for form in {secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1]}:
                pattern = re.escape(form) if len(form) >= _LONG else rf"(?<!\w){re.escape(form)}(?!\w)"
                text = re.sub(pattern, "***", text)
        return text

    def repeated_in(self, text: str) -> bool:
        """Whether a text holds a secret as it is; short ones, which may be words, are not looked for."""
        return any(len(secret) >= _LONG and secret in text for secret in self._secrets)


def open_client(address: Address, connections: int, patience: float) -> httpx.AsyncClient:
    """A client for so many connections; ``patience``: seconds without a byte. A proxy of the environment is not asked for a
    server on this machine, which it could not reach."""
    try:
        return httpx.AsyncClient(
            trust_env=not address.is_near,
            timeout=httpx.Timeout(patience, connect=min(30.0, patience), pool=None),
            headers=address.headers,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )
    except (httpx.InvalidURL, ValueError):
        raise ValueError(
            "the address of a proxy in the environment (HTTPS_PROXY, NO_PROXY, ...) is not a URL: correct it"
        ) from None
    except ImportError:
        raise ValueError(
            "the environment names a SOCKS proxy (ALL_PROXY, ...): install httpx[socks], or name an HTTP proxy"
        ) from None
    except OSError as error:
        raise ValueError(
            f"the certificates of the environment (SSL_CERT_FILE) cannot be read: {error.strerror}: correct it"
        ) from None


async def ask(
    client: httpx.AsyncClient, address: Address, body: Mapping[str, Any], reply: Reply, patience: float, most: int
) -> None:
    """Send one request and fill the reply.

    ``patience``: seconds without anything new of the completion, comments that keep the connection alive not counted.
    ``most``: bytes of the whole answer. EndpointError, or PassingFailure for what may pass.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(patience) as clock, client.stream("POST", address.url, json=body) as response:
            kind = response.headers.get("content-type", "").lower()
            if response.status_code != 200:
                said = await _beginning(response)
                wait = wait_of(response.headers)
                raise_status(response.status_code, response.reason_phrase, said, wait, address.hide)
            if found := _STREAMS.search(kind):
                said = short(address.hide(await _beginning(response)), 100)
                raise EndpointError(
                    f"it answers with {found[0]} in place of a completion ({said}): a login page, or another server's address?"
                )
            async for event in events(_bounded(response.aiter_bytes(), most)):
                if reply.add(event):
                    clock.reschedule(loop.time() + patience)
    except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise_broken(error, address.hide)


async def fetch(
    client: httpx.AsyncClient, url: str, most: int, body: Mapping[str, Any] | None = None
) -> tuple[int, str, bytes]:
    """Status, its phrase and the whole answer, of at most ``most`` bytes, to a GET, or with ``body`` to a POST. PassingFailure
    where nobody answers."""
    try:
        async with client.stream("GET" if body is None else "POST", url, json=body) as response:
            if response.status_code != 200:
                return response.status_code, response.reason_phrase, (await _beginning(response)).encode()
            said = b"".join([part async for part in _bounded(response.aiter_bytes(), most)])
            return response.status_code, response.reason_phrase, said
    except httpx.TransportError as error:
        raise_broken(error)


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The payloads of a server-sent event stream, up to ``[DONE]``; of a body that is no such stream, all of it.

    An event ends at a blank line; where a server leaves that out, at the next one, unless its JSON goes on there. What a closed
    connection has left of one is ignored.
    """
    strays: list[bytes] = []
    data: list[bytes] = []
    seen = False
    async for line in _lines(chunks):
        name, colon, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        value = value.strip()
        is_done = name == b"data" and value == b"[DONE]"
        speaks = name in (b"data", b"error") and value
        if data and (not line or is_done or (speaks and len(data) == 1 and not _goes_on(data[0]))):
            yield b"\n".join(data)
            data = []
        if is_done:
            return
        if speaks:
            seen = True
            data.append(value if name == b"data" else b'{"error": ' + value + b"}")
        elif name.strip() not in (b"", b"data", b"event", b"id", b"retry") or (name.strip() and not colon):
            strays.append(line)
    rest = b"\n".join(data if seen else strays)
    if rest and not _goes_on(rest):
        yield rest


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines, in time that grows with their length only. They end at CR, LF or both, and nowhere else: JSON may contain U+2028
    and the like, where ``str.splitlines`` would split too."""
    parts: list[bytes] = []
    held = b""
    async for chunk in chunks:
        whole = held + chunk
        held = b"\r" if whole.endswith(b"\r") else b""  # an LF may follow
        first, *more = _LINE_END.split(whole.removesuffix(held))
        parts.append(first)
        for piece in more:
            yield b"".join(parts)
            parts = [piece]
    if rest := b"".join(parts):
        yield rest


def _goes_on(data: bytes) -> bool:
    """Whether it is the beginning of a JSON value."""
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        return data.startswith((b"{", b"[")) and "Extra data" not in str(error)
    return False


async def _bounded(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The chunks; EndpointError as soon as they are more than ``most`` bytes."""
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if total > most:
            raise EndpointError(f"its answer is longer than {most} bytes, far more than was asked for")
        yield chunk


async def _beginning(response: httpx.Response) -> str:
    """The first part of a refusal, of whatever length it is; of a redirection, where it leads."""
    if response.has_redirect_location:
        return _without_secrets(response.headers["location"])
    data = b""
    with contextlib.suppress(httpx.HTTPError):
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > _MOST_OF_A_REFUSAL:
                break
    return data[:_MOST_OF_A_REFUSAL].decode(errors="replace")


async def give_up(client: httpx.AsyncClient) -> None:
    """Cancel the pending requests of this loop and close the connections."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
    await asyncio.get_running_loop().shutdown_asyncgens()


def raise_broken(error: httpx.TransportError, hide: Callable[[str], str] = str) -> NoReturn:
    """What a failed connection means: PassingFailure, and EndpointError for what no retry helps against."""
    said = short(hide(str(error))) or type(error).__name__
    remedy = next((remedy for sign, remedy in _NO_TLS.items() if sign in said), None)
    if remedy is not None:
        raise EndpointError(f"{said}: {remedy}") from error
    raise PassingFailure("connection", said) from error


def raise_status(status: int, phrase: str, said: str, wait: float = 0.0, hide: Callable[[str], str] = str) -> NoReturn:
    """A status other than 200: some, and all from 500 on, are temporary."""
    message = f"answers {status} {short(hide(phrase), 60)}" + (f": {short(hide(said))}" if said else "")
    if (status in PASSING or status >= 500) and "insufficient_quota" not in said:  # OpenAI's word for no money left
        raise PassingFailure(str(status), message, wait)
    hint = {
        401: "give the right api_key (--api-key-variable)",
        403: "give an api_key that may use the model",
        404: "give a base_url up to /v1, and a model that it serves",
    }
    if 300 <= status < 400:
        raise EndpointError(f"{message}: it sends requests elsewhere, give the address that answers itself")
    raise EndpointError(message + (f": {hint[status]}" if status in hint else ""))


def _checked_key(api_key: str) -> str:
    """The key without the blanks and line ends that files and shells leave around one."""
    key = api_key.strip()
    if not key:
        raise ValueError("the api_key is empty: give the endpoint's key, or none")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(
            "the api_key holds blanks, line ends or characters beyond ASCII, which a header cannot carry: look at where it "
            "comes from (it is not shown here)"
        )
    return key


def _without_secrets(address: str) -> str:
    """An address as it may be shown: without what stands before an @, and without what follows ? or #.

    >>> _without_secrets("http://user:pa/ss@host:8000/v1?key=1")
    'http://***@host:8000/v1'
    """
    scheme, slashes, rest = address.rpartition("://") if address.count("://") == 1 else ("", "", address)
    _, at, place = rest.rpartition("@")
    return scheme + slashes + (f"***{at}" if at else "") + re.split("[?#]", place)[0]
