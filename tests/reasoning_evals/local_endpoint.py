"""A small completions server on this machine that behaves, and misbehaves, as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Hands each request's body to the server's ``say``."""

    server: Server
    protocol_version = "HTTP/1.0"  # the end of the connection ends the answer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            self.server.say(self, body)
        except OSError:
            pass  # the client has gone
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def do_GET(self) -> None:
        self.start(*self.server.said_of.get(self.path, (404, "text/plain"))[:2])
        self.write(self.server.said_of.get(self.path, (404, "", b""))[2])

    def start(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def event(self, text: str, finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "text": text, "finish_reason": finish, **more}
        self.write(b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n")

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, say: Say, port: int = 0, handler: type[Handler] = Handler) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.say = say
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.released = threading.Event()
        self.said_of: dict[str, tuple[int, str, bytes]] = {}
        """What it says of itself, by path: status, type, content."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(say: Say) -> Iterator[Server]:
    """A server that is there for the length of the block."""
    server = Server(say)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
