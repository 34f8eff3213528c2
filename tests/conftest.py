"""What the tests of one process share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rank_processes


@pytest.fixture(scope="session", autouse=True)
def no_server_stays() -> Iterator[None]:
    """The server that starts ranks ends with the tests."""
    yield
    rank_processes.stop_server()


@pytest.fixture(scope="session", autouse=True)
def rehearsed_once() -> Iterator[None]:
    """Starts and plans of one model share its rehearsal, which takes most of their time: hundreds of tests start a job."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # else no test of this process loads a model
            from moe_steer.backends import memory

            for name in ("rehearse", "rehearse_step"):
                patch.setattr(memory, name, once(getattr(memory, name)))
        yield


def once(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work``, done once for each configuration, precision and size."""
    done: dict[Any, Any] = {}

    def remembered(model: Any, *sizes: Any) -> Any:
        key = (type(model), model.config.to_json_string(), next(model.parameters()).dtype, *sizes)
        if key not in done:
            done[key] = work(model, *sizes)
        return done[key]

    return remembered
