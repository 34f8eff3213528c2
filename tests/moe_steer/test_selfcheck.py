"""The start-up check: quiet where steering is right, loud where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from families import REFUSED, available, build
from moe_steer import selfcheck
from moe_steer.hooks import routing_hooks
from moe_steer.selfcheck import BackendCheckFailed, check_backend


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "qwen2"])
def test_a_model_that_is_steered_right_passes(name: str) -> None:
    model = getattr(tiny, name)()
    before = tiny.hook_count(model)
    check_backend(model)
    assert tiny.hook_count(model) == before


@pytest.mark.parametrize("name", [name for name in available() if name not in REFUSED])
def test_every_family_passes(name: str) -> None:
    """A.X K1 and Gemma-4 put a norm behind the experts' sum: there the block is not linear in a gain."""
    check_backend(build(name))


def test_a_forward_that_fails_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(selfcheck, "_logits", fail)
    with pytest.raises(BackendCheckFailed, match="a forward pass ended in AssertionError; use another backend"):
        check_backend(tiny.deepseek_v3())


def test_a_model_in_bfloat16_passes() -> None:
    import copy

    check_backend(copy.deepcopy(tiny.deepseek_v3()).to(torch.bfloat16))


def sabotage(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let steering (not observing) reach the routing through ``change``."""

    @contextmanager
    def hooks(functions: Any) -> Iterator[None]:
        with routing_hooks({layer: change(function) for layer, function in functions.items()}):
            yield

    monkeypatch.setattr("moe_steer.steering.routing_hooks", hooks)


def test_a_hook_that_does_not_bite_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda function: lambda ids, weights: function(ids, weights) * 0 + weights)
    with pytest.raises(BackendCheckFailed, match="the hook does not bite"):
        check_backend(tiny.deepseek_v3())


def test_steering_off_the_formula_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda function: lambda ids, weights: function(ids, weights).clamp(max=1.0))
    with pytest.raises(BackendCheckFailed, match=r"off the formula by|changed nothing"):
        check_backend(tiny.deepseek_v3())


def test_steering_other_tokens_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def everyone(function: Any) -> Any:
        def changed(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            new_TK = function(ids_TK, weights_TK)
            gain = (new_TK / weights_TK).flatten()
            return weights_TK * gain[(gain - 1).abs().argmax()]

        return changed

    sabotage(monkeypatch, everyone)
    with pytest.raises(BackendCheckFailed, match="changed tokens that did not select it"):
        check_backend(tiny.deepseek_v3())


def test_ids_that_are_local_to_a_rank_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers <= 5.17 shows under expert parallelism: ids below E / ranks, and a sentinel for the others."""

    @contextmanager
    def observe(model: Any, sink: Any) -> Iterator[None]:
        from moe_steer.observe import observe_routing

        def local(layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
            sink(layer, torch.where(ids_TK < 8, ids_TK, 8), weights_TK)

        with observe_routing(model, local):
            yield

    monkeypatch.setattr(selfcheck, "observe_routing", observe)
    with pytest.raises(BackendCheckFailed, match="expert ids that are not global"):
        check_backend(tiny.deepseek_v3())
