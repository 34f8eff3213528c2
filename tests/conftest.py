"""What the tests of one process share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import rank_processes


@pytest.fixture(scope="session", autouse=True)
def no_server_stays() -> Iterator[None]:
    """The server that starts ranks ends with the tests."""
    yield
    rank_processes.stop_server()
