"""Rows that take the places of finished ones: same samples, streams, processors and steering as alone; no column is kept for rows
that have left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

import tiny
from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.inside import cache_of
from moe_steer.thinking import TokenTags
from reasoning_evals.decoding import ThinkingBudget
from reasoning_evals.engines import batch as batches
from reasoning_evals.engines import cache_rows
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.kv_cache import GrowingLayer
from reasoning_evals.engines.sampling import Request, SamplingConfig, UniformStreams
from tiny_reasoners import tiny_model, tiny_tokenizer

QUESTIONS = ["why?", "what is 1+1?", "2+2", "compute 12*3 and then add 4, please.", "why?", "a long question, " * 4] * 3


def sampler_of(kind: str, **options: Any) -> InProcessSampler:
    model = tiny_model(kind, seed=1)
    model.generation_config.eos_token_id = [1, 20, 33]
    return InProcessSampler(model, tiny_tokenizer(), **options)


def requests_of(sampler: InProcessSampler) -> list[Request]:
    return [Request(sampler.render(question).token_ids, 100 + i, i) for i, question in enumerate(QUESTIONS)]


def drawn(sampler: InProcessSampler, requests: list[Request], **config: Any) -> list[tuple[int, tuple[int, ...]]]:
    made = sampler.sample(requests, SamplingConfig(**{"max_new_tokens": 60, **config}))
    return [(sample.key, sample.token_ids) for sample in made]


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_a_sample_does_not_depend_on_when_its_row_joined(kind: str, size: int) -> None:
    sampler = sampler_of(kind, batch_size=size)
    requests = requests_of(sampler)
    first = drawn(sampler, requests)
    assert first == drawn(sampler, requests), "the same requests give the same samples in the same order"
    assert dict(first) == dict(drawn(sampler_of(kind), requests))
    assert len({len(ids) for _, ids in first}) > 5


def test_places_are_taken_before_the_last_row_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, rows, widths = sampler_of("qwen2", batch_size=8), [], []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        mask_BT = kwargs["attention_mask"]
        if kwargs["input_ids"].shape[1] == 1:
            rows.append(len(mask_BT))
            widths.append(int(mask_BT.any(0).long().argmax()))
            past = cache_of(kwargs)
            assert {layer.get_seq_length() for layer in past.layers} == {mask_BT.shape[1] - 1}

    handle = sampler.model.register_forward_pre_hook(watch, with_kwargs=True)
    requests = requests_of(sampler)
    refilled = drawn(sampler, requests)
    handle.remove()
    assert max(rows) == 8
    assert min(rows[: len(rows) // 2]) > 8 - 8 // 4 - 1, "a quarter of the places is free at most, while requests wait"
    assert sum(rows) == sum(len(ids) - 1 for _, ids in refilled)
    assert max(widths) < batches._ENOUGH_PADDING, "columns that are padding in every row"


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    used=st.lists(st.integers(0, 300), min_size=3, max_size=3),
    after=st.integers(1, 300),
)
@settings(deadline=None, max_examples=30)
def test_joined_streams_go_on_where_they_were(sizes: list[int], used: list[int], after: int) -> None:
    device, seed, parts, alone = torch.device("cpu"), 0, [], []
    for size, number in zip(sizes, used, strict=False):
        seeds = list(range(seed, seed + size))
        seed += size
        parts.append(UniformStreams(seeds, device))
        alone += [(UniformStreams([one], device), number) for one in seeds]
        for _ in range(number):
            parts[-1].next()
    parts[0].join(parts[1:])
    joined = torch.stack([parts[0].next() for _ in range(after)], 1)
    for row, (stream, number) in zip(joined, alone, strict=True):
        assert torch.equal(row, torch.cat([stream.next() for _ in range(number + after)])[number:])


def layer_of(kind: str) -> Any:
    if kind == "sliding":
        return DynamicSlidingWindowLayer(sliding_window=7)
    return {"growing": GrowingLayer, "joint": lambda: GrowingLayer(joint=True), "plain": DynamicLayer, "indexed": DynamicIndexedLayer}[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["growing", "joint", "plain", "indexed", "sliding"])
@pytest.mark.parametrize("lengths", [(5, 3, 3), (2, 9, 4), (12, 12, 1)])
def test_joined_and_narrowed_caches_hold_each_row_as_alone(kind: str, lengths: tuple[int, int, int]) -> None:
    """What the layer returns for the next token of each row ends with that row's own states, in order."""
    generator = torch.Generator().manual_seed(0)
    caches, rows = [], []
    for num_rows, length in zip((2, 1, 3), lengths, strict=True):
        states = torch.randn(2, num_rows, 2, length + 6, 3, generator=generator)
        rows += [(states[:, row], length) for row in range(num_rows)]
        caches.append(DynamicCache())
        caches[-1].layers.append(layer_of(kind))
        caches[-1].layers[0].update(*states[..., :length, :])
        if kind == "indexed":
            caches[-1].layers[0].update_indexer(states[0, :, 0, :length])
    layer, width = caches[0].layers[0], max(lengths)
    cache_rows.join_rows(caches[0], caches[1:], width, width + 9)
    for step in range(6):
        if step == 3:  # the longer rows leave, and with them the columns that only they have
            keep = [row for row, (_, length) in enumerate(rows) if length == min(lengths)]
            cache_rows.select_rows(caches[0], torch.tensor(keep), len(rows))
            cache_rows.drop_columns(caches[0], width - min(lengths))
            rows, width = [rows[row] for row in keep], min(lengths)
        new = torch.stack([states[:, :, length + step] for states, length in rows], 1)[..., None, :]
        keys, values = layer.update(*new)
        index = layer.update_indexer(new[0, :, 0]) if kind == "indexed" else keys[:, 0]
        assert layer.get_seq_length() == width + step + 1
        for row, (states, length) in enumerate(rows):
            stop = length + step + 1
            seen = min(stop, 7) if kind == "sliding" else stop
            assert torch.equal(keys[row, :, -seen:], states[0, :, stop - seen : stop])
            assert torch.equal(values[row, :, -seen:], states[1, :, stop - seen : stop])
            assert torch.equal(index[row, -seen:], states[0, 0, stop - seen : stop])


def test_processors_see_each_row_as_alone() -> None:
    rules = LogitsProcessorList([ThinkingBudget(num_tokens=9, tags=TokenTags.of_pair((6,), (7,)))])
    few, many = (sampler_of("qwen2", processors=rules, batch_size=size) for size in (3, 18))
    requests = requests_of(few)
    made = dict(drawn(few, requests))
    assert made == dict(drawn(many, requests))
    assert max(ids.index(7) for ids in made.values() if 7 in ids) == 8, (
        "the prompt holds the first token of the thought"
    )


def test_rows_that_were_started_outside_of_a_plan_are_refused() -> None:
    model = tiny.qwen3_moe()
    sampler = InProcessSampler(model, tiny.TinyTokenizer(), batch_size=4)
    plan = SteeringPlan(experts=[ExpertGain(1, 0, 2.0)], scope="after:1")
    requests = [Request((5, 6, 7 + i), i, i) for i in range(9)]
    samples = sampler.sample(requests, SamplingConfig(max_new_tokens=200))
    next(samples)
    with (
        steer(model, plan, tokenizer=tiny.TinyTokenizer(), quiet=True),
        pytest.raises(ValueError, match="filled before"),
    ):
        list(samples)
