"""What the tests of one process share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rank_processes

SLOWEST = (
    "test_documented.py",
    "launch/test_every_family.py",
    "launch/test_controls.py",
    "launch/test_sharded_backends.py",
    "launch/test_sharded_failures.py",
    "launch/test_steer_r1.py",
    "launch/test_reduce_overthinking.py",
    "launch/test_evaluate.py",
    "reasoning_evals/test_run.py",
    "moe_steer/test_whole_checkpoints.py",
    "launch/test_later_jobs_over_ranks.py",
    "launch/test_sharded_resume.py",
    "launch/test_sharded_recipes.py",
    "launch/test_causes.py",
    "launch/test_own_server.py",
    "launch/test_uneven_ranks.py",
    "launch/test_safety.py",
)
"""Files that take half a minute and more: they start first, so that none of them is still running when all others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(SLOWEST)))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: collections that walk them all again and again take a twelfth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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


@pytest.fixture(scope="module", autouse=True)
def no_group_stays() -> Iterator[None]:
    """A process group of one, which a sharded backend makes in the process of the tests, ends with its file: later tests ask
    whether ranks have met."""
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def once(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work``, done once for each configuration, precision and size."""
    done: dict[Any, Any] = {}

    def remembered(model: Any, *sizes: Any) -> Any:
        key = (type(model), model.config.to_json_string(), next(model.parameters()).dtype, *sizes)
        if key not in done:
            done[key] = work(model, *sizes)
        return done[key]

    return remembered
