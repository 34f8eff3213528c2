"""A GPU whose memory runs out: rows are set aside, start again, and come out as if nothing had happened."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_steer import ExpertGain, SteeringPlan, steer
from reasoning_evals.engines import batch as batches
from reasoning_evals.engines import in_process
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request
from test_sampling_refill import drawn, requests_of, sampler_of

pytestmark = pytest.mark.slow


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


class Steps:
    """Counts the forwards of one token, and their rows."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        self._handle = model.register_forward_pre_hook(self._call, with_kwargs=True)

    def _call(self, _: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            self.rows.append(len(kwargs["input_ids"]))

    def remove(self) -> None:
        self._handle.remove()


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_room_planned_for_long_answers_holds_more_short_ones(kind: str, rows: int, greedy: bool) -> None:
    """The cache never outgrows the room, every sample is the same, and short answers leave room for more rows at once."""
    sampler = sampler_of(kind, batch_size=16)
    sampler.model.generation_config.eos_token_id = list(range(0, 40, 3))  # most answers are far shorter than the limit
    short = [request for request in requests_of(sampler) if len(request.prompt_ids) < 40]
    requests = [Request(one.prompt_ids, seed, (one.key, seed)) for one in short for seed in range(4)]
    rule = {"greedy": greedy, "max_new_tokens": 150}
    context = max(len(request.prompt_ids) for request in requests) + 150

    def made(stretches: bool) -> tuple[dict[Any, Any], Steps, Card]:
        one = InProcessSampler(sampler.model, sampler.tokenizer, batch_size=16)
        one.hold(rows, sets_aside=False, context=context if stretches else 0)
        card, steps = Card(sampler.model, rows * context), Steps(sampler.model)
        found = drawn(one, requests, **rule)
        card.remove()
        steps.remove()
        assert len(found) == len(requests), "each once"
        return dict(found), steps, card

    expected, before, _ = made(stretches=False)
    found, after, card = made(stretches=True)
    assert found == expected
    assert card.failures == 0
    assert max(before.rows) <= rows
    if not greedy:  # the most likely tokens may go round and round up to the limit
        assert max(after.rows) > rows
        assert len(after.rows) < len(before.rows)


def test_short_answers_are_common_enough_for_the_test_above() -> None:
    sampler = sampler_of("qwen2")
    sampler.model.generation_config.eos_token_id = list(range(0, 40, 3))
    one = InProcessSampler(sampler.model, sampler.tokenizer)
    lengths = [len(ids) for _, ids in drawn(one, requests_of(one), max_new_tokens=150)]
    assert sorted(lengths)[9 * len(lengths) // 10] < 75


@given(
    lengths=st.lists(st.integers(1, 60), min_size=24, max_size=24),
    rows=st.integers(1, 6),
    places=st.integers(1, 24),
)
@settings(max_examples=60, deadline=None)
def test_any_lengths_stay_within_the_room(lengths: list[int], rows: int, places: int) -> None:
    """Whatever the answers' lengths: the rectangle stays within the room, each answer comes once, and the rounds end."""

    class Pretended:
        """A batch without a model: row i ends after its request's seed tokens."""

        def __init__(self, decoder: Any, requests: list[Request]) -> None:
            self.requests, self.start_width = list(requests), max(len(r.prompt_ids) for r in requests)
            self.done = [0] * len(self.requests)
            self.width = self.start_width
            self.born = [self.width] * len(self.requests)

        def __len__(self) -> int:
            return len(self.requests)

        def start(self) -> list[Any]:
            return self.step()

        def step(self) -> list[Any]:
            sizes.append((len(self), sum(map(len, rounds._live)), self.width))
            self.width += 1
            out = [r for r, born in zip(self.requests, self.born, strict=True) if self.width - born >= r.seed]
            kept = [(r, b) for r, b in zip(self.requests, self.born, strict=True) if r not in out]
            self.requests, self.born = [r for r, _ in kept], [b for _, b in kept]
            return [batches.Finished(r, (0,) * r.seed) for r in out]

        def join(self, others: list[Any]) -> None:
            width = max([self.width, *(other.width for other in others)])
            self.born = [b + width - part.width for part in [self, *others] for b in part.born]
            self.requests = [r for part in [self, *others] for r in part.requests]
            self.width = width

        def keep(self, number: int) -> list[Request]:
            order = sorted(range(len(self)), key=lambda row: self.born[row])
            back = [self.requests[row] for row in sorted(order[number:])]
            kept = sorted(order[:number])
            self.requests, self.born = [self.requests[i] for i in kept], [self.born[i] for i in kept]
            return back

    requests = [Request((1,) * (3 + i % 5), length, i) for i, length in enumerate(lengths)]
    sizes: list[tuple[int, int, int]] = []
    context = 7 + 60
    decoder = SimpleNamespace(joins=True, takes_padding=True)
    rounds = in_process.Rounds(decoder, requests, places, False, in_process.CacheRoom(rows * context, context))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "Batch", Pretended)
        finished = [done.request.key for done in rounds]
    assert sorted(finished) == list(range(24))
    assert all(own * width <= rows * context for own, _, width in sizes)
    assert len(sizes) < 40 * 70
