"""A playground that is served while a test asks it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from launch.playground.playground import Opened, Playground, serve

PLAIN: dict[str, Any] = {"kind": "plain"}
YOURS: dict[str, Any] = {"kind": "plan", "plan": "yours", "dose": 1.0}


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """The address of a playground of these options."""
    with listening(Playground(port=0, **options).open()) as address:
        yield address


@contextmanager
def listening(opened: Opened) -> Iterator[str]:
    """Its address, while it is served."""
    import uvicorn

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=serve, args=(opened, servers.append), daemon=True)
    thread.start()
    try:
        yield opened.address
    finally:
        servers[0].handle_exit(signal.SIGINT, None)
        thread.join()
        opened.listening.close()


def settings(*columns: Mapping[str, Any], index: int = 0, **more: Any) -> dict[str, Any]:
    """What a page sends; the plan turns one expert of the lab up."""
    return {
        "prompt": {"index": index},
        "sampling": {"seed": 3, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 60},
        "plan": {
            "base": None,
            "experts": [{"layer": 2, "expert": 5, "gain": 8.0}],
            "scope": "all",
            "renormalize": False,
        },
        "columns": list(columns) or [PLAIN, YOURS],
        "colour": "steered",
    } | more


def heard(client: httpx.Client, page: str, colour: str = "") -> list[dict[str, Any]]:
    """The columns of a page's run, once all have ended: the last that was said of each."""
    last: dict[int, dict[str, Any]] = {}
    with client.stream("GET", f"/api/pages/{page}/events", params={"colour": colour}) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            if line.startswith('data: {"column"'):
                news = json.loads(line.removeprefix("data: "))
                last[news["column"]] = news
    return [last[number] for number in sorted(last)]


def ran(client: httpx.Client, page: str, asked: Mapping[str, Any], colour: str = "") -> list[dict[str, Any]]:
    """The columns of a run of these settings."""
    started = client.post(f"/api/pages/{page}/run", json=asked)
    assert started.status_code == 202, started.text
    return heard(client, page, colour)


def ids(column: Mapping[str, Any]) -> list[int]:
    """The tokens of a column."""
    assert column["from"] == 0
    return [token["id"] for token in column["tokens"]]


def texts(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of columns."""
    return ["".join(token["text"] for token in column["tokens"]) for column in columns]
