"""The requests to one server, of however many arms and threads: so many under way at once, the others wait in line."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import httpx

from reasoning_evals.engines.http_client import Address, give_up, open_client

Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


class Traffic:
    """At most ``places`` requests to one server under way at once, first come first served."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.resume_at = 0.0
        """Nobody asks before this time of the monotonic clock: the server wanted a pause."""
        self._lock = threading.Lock()
        self._calls: list[SimpleQueue[Any]] = []
        self._loop: _Loop | None = None
        self._server: tuple[str, dict[str, str]] | None = None

    def ask(self, address: Address, patience: float, asks: Sequence[Ask]) -> Iterator[Any]:
        """What each returns, as soon as it is there; raises what the first to fail has raised.

        ``patience``: seconds without a byte. Requests that are pending when this is closed are cancelled.
        """
        found: SimpleQueue[Any] = SimpleQueue()
        with self._open(address, patience, found) as loop:
            futures = [loop.submit(self._one(loop, ask, found)) for ask in asks]
            try:
                for _ in futures:
                    result = found.get()
                    if isinstance(result, BaseException):
                        raise result
                    yield result
            finally:
                for future in futures:
                    future.cancel()

    def end(self, error: BaseException) -> None:
        """Whoever waits for an answer gets this error; nothing where nobody does."""
        for found in list(self._calls):  # without the lock: its holder may wait for the thread that is here
            found.put(error)

    async def _one(self, loop: _Loop, ask: Ask, found: SimpleQueue[Any]) -> None:
        try:
            async with loop.free:
                found.put(await ask(loop.client))
        except Exception as error:
            found.put(error)

    @contextmanager
    def _open(self, address: Address, patience: float, found: SimpleQueue[Any]) -> Iterator[_Loop]:
        """The loop, which is there while somebody asks."""
        server = address.at(""), address.headers
        with self._lock:
            if self._server not in (None, server):  # its key would go elsewhere
                raise ValueError("a Traffic is for one server and one key: make another one for another server")
            self._server = server
            loop = self._loop = self._loop or _Loop(open_client(address, self.places, patience), self.places)
            self._calls.append(found)
        try:
            yield loop
        finally:
            with self._lock:
                self._calls.remove(found)
                if not self._calls:
                    loop.close()
                    self._loop = None


class _Loop:
    """An event loop in a thread of its own: it works inside notebooks, and what is pending can be cancelled at once."""

    def __init__(self, client: httpx.AsyncClient, places: int) -> None:
        self.client = client
        self.free = asyncio.Semaphore(places)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-sampler", daemon=True)
        self._thread.start()

    def submit(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self.submit(give_up(self.client)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
