"""What the tests of one process share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import rank_processes

SAME_WORKER = {"test_sharded_recipes.py": "recipes", "test_real_models_page.py": "recipes"}
"""File -> the group that it is in; every other file is a group of its own."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``--dist loadgroup`` one worker runs all tests of a group, so that what they share is made once."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(SAME_WORKER.get(item.path.name, item.path.name)))


@pytest.fixture(scope="session", autouse=True)
def no_server_stays() -> Iterator[None]:
    """The server that starts ranks ends with the tests."""
    yield
    rank_processes.stop_server()
