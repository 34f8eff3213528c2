"""A GPU whose memory runs out: rows are set aside, start again, and come out as if nothing had happened."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from moe_steer import ExpertGain, SteeringPlan, steer
from test_sampling_refill import drawn, requests_of, sampler_of


class Card:
    """A GPU that holds ``tokens`` of keys and values: asked for more, the forward fails in its last layer."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.tokens, self.failures, self.most = tokens, 0, 0
        layer = model.model.layers[-1]
        self._handles = [
            layer.register_forward_pre_hook(self._look),
            model.register_forward_pre_hook(self._call, with_kwargs=True),
        ]

    def _call(self, _: Any, args: Any, kwargs: Any) -> None:
        self.asked = kwargs["attention_mask"].numel()

    def _look(self, *_: Any) -> None:
        if self.asked > self.tokens:
            self.failures += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.most = max(self.most, self.asked)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("tokens", [150, 260])
@pytest.mark.parametrize("greedy", [True, False])
def test_rows_are_set_aside_where_memory_runs_out(
    kind: str, tokens: int, greedy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = sampler_of(kind, batch_size=8)
    requests = requests_of(sampler)
    expected = dict(drawn(sampler, requests, greedy=greedy))
    model = sampler.model
    card = Card(model, tokens)
    made = drawn(sampler, requests, greedy=greedy)
    again = drawn(sampler, requests, greedy=greedy)
    card.remove()
    assert dict(made) == dict(again) == expected
    assert len(made) == len(requests), "each once"
    assert 0 < card.failures <= 6
    assert card.most <= tokens
    assert re.search(
        r"^GPU memory ran out with \d rows \(CUDA out of memory\): from here on \d are", capsys.readouterr().out
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sampler.hold(8, sets_aside=False)
        card = Card(model, tokens)
        try:
            drawn(sampler, requests)
        finally:
            card.remove()


def test_one_row_that_does_not_fit_is_an_error() -> None:
    sampler = sampler_of("qwen2", batch_size=8)
    card = Card(sampler.model, 20)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        drawn(sampler, requests_of(sampler))
    card.remove()
    assert card.failures <= 5


def test_a_steered_row_that_starts_again_is_steered_the_same() -> None:
    sampler = sampler_of("deepseek_v3", batch_size=8)
    requests = requests_of(sampler)
    plan = SteeringPlan(experts=[ExpertGain(1, 0, 8.0)], scope="after:3")
    with steer(sampler.model, plan, quiet=True):
        expected = dict(drawn(sampler, requests))
        card = Card(sampler.model, 300)
        found = dict(drawn(sampler, requests))
        card.remove()
    assert card.failures
    assert found == expected
    assert found != dict(drawn(sampler, requests))
