"""Counting through tiny models, against a per-token loop over separately recorded routing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from expert_stats import MarkerSet, RoutingCounts, Trace, collect_counts, score_experts, select_experts
from expert_stats.collect import batches, router_digest
from expert_stats.counts import group_of, sum_counts
from stats_helpers import MARKERS, random_traces
from tiny import VOCAB, deepseek_v3, qwen2, qwen3_moe

MODELS = {"deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe}
models = pytest.mark.parametrize("name", list(MODELS))


def recorded_routing(model: Any, trace: Trace) -> dict[int, list[list[int]]]:
    """Expert ids of every token, per decoder layer, from the router's own output: one trace at a time, no padding."""
    found: dict[int, list[list[int]]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            handles.append(
                layer.mlp.gate.register_forward_hook(
                    lambda _, __, out, at=index: found.__setitem__(at, out[2].tolist())
                )
            )
    with torch.no_grad():
        model(torch.tensor([trace.token_ids]))
    for handle in handles:
        handle.remove()
    return found


def naive_counts(
    model: Any, traces: Sequence[Trace], markers: MarkerSet, base: str, like: RoutingCounts
) -> dict[str, Any]:
    """Token by token, in Python."""
    arrays = {name: np.zeros_like(array) for name, array in like.arrays.items()}
    for trace in traces:
        group = group_of(trace.trace_id, like.num_groups)
        routing = recorded_routing(model, trace)
        last_tokens: list[set[int]] = []
        for marker in markers.markers:
            ends, at = set(), 0
            while at < len(trace.token_ids):
                form = next((f for f in marker.forms if trace.token_ids[at : at + len(f)] == f), None)
                if form:
                    ends.add(at + len(form) - 1)
                at += len(form) if form else 1
            first = 0 if base == "all" else trace.prompt_length - 4
            last_tokens.append({end for end in ends if end >= first})
        arrays["num_traces_G"][group] += 1
        for position in range(len(trace.token_ids)):
            at_markers = [index for index, ends in enumerate(last_tokens) if position in ends]
            if base == "generated" and position < trace.prompt_length and not at_markers:
                continue
            arrays["total_G"][group] += 1
            for index in at_markers:
                arrays["marker_GM"][group, index] += 1
            for layer, decoder_layer in enumerate(sorted(routing)):
                for expert in routing[decoder_layer][position]:
                    arrays["expert_GLE"][group, layer, expert] += 1
                    for index in at_markers:
                        arrays["joint_GMLE"][group, index, layer, expert] += 1
    return arrays


@models
@pytest.mark.parametrize("base", ["generated", "all"])
def test_counts_equal_a_naive_loop(name: str, base: str) -> None:
    model, traces = MODELS[name](), random_traces(14)
    counts = collect_counts(model, traces, MARKERS, base=base, num_groups=5)
    for key, array in naive_counts(model, traces, MARKERS, base, counts).items():
        np.testing.assert_array_equal(counts.arrays[key], array, err_msg=key)
    assert counts.marker_GM.sum(0).min() >= 14


@models
def test_neither_batches_nor_order_nor_padding_matter(name: str) -> None:
    model, traces = MODELS[name](), random_traces(13)
    whole = collect_counts(model, traces, MARKERS)
    shuffled = random.Random(1).sample(traces, len(traces))
    assert collect_counts(model, shuffled, MARKERS) == whole
    assert collect_counts(model, traces, MARKERS, batch_size=1) == whole
    assert collect_counts(model, traces, MARKERS, tokens_per_batch=100) == whole
    assert collect_counts(model, traces, MARKERS, tokens_per_batch=1) == whole


@models
def test_shards_add_up_to_the_whole(name: str) -> None:
    model, traces = MODELS[name](), random_traces(10)
    shards = [traces[:1], traces[1:4], [], traces[4:]]
    parts = [collect_counts(model, shard, MARKERS, allow_empty=True) for shard in shards]
    assert sum_counts(parts[::-1]) == collect_counts(model, traces, MARKERS)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = deepseek_v3()
    ids = torch.tensor([random_traces(1)[0].token_ids])
    with torch.no_grad():
        before = model(ids).logits
        collect_counts(model, random_traces(4), MARKERS)
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.train()
    collect_counts(model, random_traces(2), MARKERS)
    assert model.training
    model.eval()


def test_the_whole_way_to_a_plan() -> None:
    model = deepseek_v3()
    plan = select_experts(score_experts(collect_counts(model, random_traces(20), MARKERS)), top=2)
    plan.check(model)
    assert len(plan.experts) == 2


def test_predicted_positions_are_one_earlier() -> None:
    model, traces = qwen3_moe(), random_traces(6)
    before = collect_counts(model, traces, MarkerSet(markers=MARKERS.markers, position="predicted"), num_groups=1)
    expected = np.zeros((3, 8), dtype=np.int64)
    for trace in traces:
        routing = recorded_routing(model, trace)
        at = trace.token_ids.index(2, trace.prompt_length) - 1
        for layer in range(3):
            expected[layer, routing[layer][at]] += 1
    only_first = MarkerSet(markers=MARKERS.markers, position="predicted", repeats="first")
    found = collect_counts(model, traces, only_first, num_groups=1)
    np.testing.assert_array_equal(found.joint_GMLE[0, 1], expected)
    assert before.num_tokens == sum(
        len(set(range(t.prompt_length - 1, len(t.token_ids) - 1)) | {t.prompt_length - 3}) for t in traces
    )
    with pytest.raises(ValueError, match="markers.position is"):
        _ = before + collect_counts(model, traces, MARKERS, num_groups=1)


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ([], "there are no traces: generate some first"),
        (random_traces(2) + random_traces(1), "trace_id 'problem-0#0' occurs twice"),
        ([Trace("a", (1, VOCAB), 1)], f"trace 'a' holds the token id {VOCAB}, this model has ids 0-{VOCAB - 1}"),
        ([Trace("a", (5,) * 257, 1)], "trace 'a' has 257 tokens, this model's context 256"),
    ],
)
def test_traces_that_do_not_fit_are_refused(traces: list[Trace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_counts(deepseek_v3(), traces, MARKERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "prompt"}, "base is 'prompt': choose one of generated, all"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"batch_size": 0}, "batch_size 0: give at least 1"),
        ({"num_groups": 0}, "num_groups 0"),
        ({"prompt_tail": -1}, "prompt_tail is -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_counts(deepseek_v3(), random_traces(2), MARKERS, **options)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match="qwen2 is a dense model: routing can be counted in mixture-of-experts models only"
    ):
        collect_counts(qwen2(), random_traces(2), MARKERS)


def test_batches_hold_every_trace_once_and_keep_to_their_budget() -> None:
    traces = random_traces(30)
    for budget, size in ((90, None), (1, None), (10**6, 7), (200, 2)):
        made = list(batches(traces, budget, size))
        assert sorted(t.trace_id for batch in made for t in batch) == sorted(t.trace_id for t in traces)
        for batch in made:
            assert len(batch) == 1 or len(batch[0].token_ids) * len(batch) <= budget
            assert size is None or len(batch) <= size
            assert len(batch[0].token_ids) == max(len(t.token_ids) for t in batch)


def test_progress_is_shown_on_the_error_stream(capfd: pytest.CaptureFixture[str]) -> None:
    plain = collect_counts(qwen3_moe(), random_traces(3), MARKERS)
    assert collect_counts(qwen3_moe(), random_traces(3), MARKERS, progress=True) == plain
    shown = capfd.readouterr()
    assert "counting" in shown.err
    assert shown.out == ""


def test_two_checkpoints_of_one_shape_do_not_add_up() -> None:
    from copy import deepcopy

    model = qwen3_moe()
    other = deepcopy(model)
    assert router_digest(other) == router_digest(model) == router_digest(deepcopy(model).to(torch.bfloat16))
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight += 0.1
    with pytest.raises(ValueError, match="these counts cannot be added: routers is"):
        _ = collect_counts(model, random_traces(2), MARKERS) + collect_counts(other, random_traces(2), MARKERS)
