"""Counting through tiny models, against a per-token loop over separately recorded routing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from expert_stats import MarkerSet, Trace, collect_counts, count_routed, score_experts, select_experts
from expert_stats.collect import batches, router_digest
from expert_stats.counts import sum_counts
from expert_stats.trace_counts import NUM_BINS, reference_tokens
from moe_steer.layers import model_shape
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
    model: Any, trace: Trace, markers: MarkerSet, base: str, references: Sequence[int], num_experts: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Token by token, in Python, in float: bins by their definition."""
    shape = (len(model.model.layers), num_experts)
    arrays = {
        "expert": np.zeros((NUM_BINS, *shape), np.int64),
        "joint": np.zeros((len(markers.markers), *shape), np.int64),
        "marker": np.zeros((len(markers.markers), NUM_BINS), np.int64),
        "total": np.zeros(NUM_BINS, np.int64),
        "reference": np.zeros((len(references), *shape), np.int64),
    }
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
    for position in range(len(trace.token_ids)):
        at_markers = [index for index, ends in enumerate(last_tokens) if position in ends]
        if base == "generated" and position < trace.prompt_length and not at_markers:
            continue
        place = 0
        if position > trace.prompt_length:
            share = (position - trace.prompt_length - 1) / (len(trace.token_ids) - trace.prompt_length - 1)
            place = 1 + math.floor((NUM_BINS - 1) * share + 1e-9)
        arrays["total"][place] += 1
        for index in at_markers:
            arrays["marker"][index, place] += 1
        for layer in routing:
            for expert in routing[layer][position]:
                arrays["expert"][place, layer, expert] += 1
                for index in at_markers:
                    arrays["joint"][index, layer, expert] += 1
                if not at_markers and trace.token_ids[position] in references:
                    arrays["reference"][list(references).index(trace.token_ids[position]), layer, expert] += 1
    return {name: array[:, sorted(routing)] if array.ndim == 3 else array for name, array in arrays.items()}


@models
@pytest.mark.parametrize("base", ["generated", "all"])
def test_counts_equal_a_naive_loop(name: str, base: str) -> None:
    model, traces = MODELS[name](), random_traces(14)
    counts = collect_counts(model, traces, MARKERS, base=base)
    assert counts.references is not None
    by_id = {trace.trace_id: trace for trace in traces}
    referred = np.zeros_like(counts.references.joint_RLE)
    for trace, expert_BLE, joint_MLE in counts.unpacked():
        naive = naive_counts(model, by_id[trace.trace_id], MARKERS, base, counts.references.tokens, counts.num_experts)
        np.testing.assert_array_equal(trace.total_B, naive["total"])
        np.testing.assert_array_equal(trace.marker_MB, naive["marker"])
        np.testing.assert_array_equal(expert_BLE, naive["expert"])
        np.testing.assert_array_equal(joint_MLE, naive["joint"])
        referred += naive["reference"]
    np.testing.assert_array_equal(counts.references.joint_RLE, referred)
    np.testing.assert_array_equal(counts.references.seen_R * model.config.num_experts_per_tok, referred[:, 0].sum(-1))
    assert counts.references.seen_R.sum() > 100
    assert counts.occurrences_M.min() >= 14


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
    words = reference_tokens(traces, MARKERS)
    parts = [collect_counts(model, shard, MARKERS, references=words, allow_empty=True) for shard in shards]
    whole = collect_counts(model, traces, MARKERS)
    assert sum_counts(parts[::-1]) == whole == sum_counts(parts)
    assert sum_counts(parts).digest() == whole.digest()
    with pytest.raises(ValueError, match="trace 'problem-0#0' is there twice with the same text") as caught:
        _ = whole + parts[0]
    assert "\n" not in str(caught.value)


def test_parts_with_other_reference_tokens_keep_those_they_share() -> None:
    model, traces = qwen3_moe(), random_traces(6)
    parts = [
        collect_counts(model, share, MARKERS, references=words)
        for share, words in ((traces[:3], {8: "a", 9: "b"}), (traces[3:], {9: "b", 11: "c"}))
    ]
    both, one_pass = (
        (parts[1] + parts[0]).references,
        collect_counts(model, traces, MARKERS, references={9: "b"}).references,
    )
    assert both is not None
    assert one_pass is not None
    assert (both.tokens, both.texts) == ((9,), ("b",))
    assert both.stamp == one_pass.stamp


def test_references_are_the_frequent_tokens_and_the_first_ones_without_the_markers() -> None:
    traces = [Trace("a", (9, 1, 7, 7, 7, 8, 8, 2, 30, 31, 32, 33, 34), 2, 2, 7)]
    assert list(reference_tokens(traces, MARKERS)) == [7, 8, 30, 31, 32, 33, 34]
    assert reference_tokens(traces, MARKERS, str)[30] == "30"
    many = [Trace(str(n), (9, 1, *([50 + n] * (100 - n)), 2, 6), 2, 2, 102 - n) for n in range(60)]
    chosen = reference_tokens(many, MARKERS)
    assert set(range(50, 89)) <= set(chosen)  # with 6, the 40 most frequent; then the first ones
    assert len(chosen) == 56
    assert reference_tokens(many[::-1], MARKERS) == chosen


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
    plan = select_experts(score_experts(collect_counts(model, random_traces(20), MARKERS)), top=2, max_q=None)
    plan.check(model)
    assert len(plan.experts) == 2


def test_predicted_positions_are_one_earlier() -> None:
    model, traces = qwen3_moe(), random_traces(6)
    before = collect_counts(model, traces, MarkerSet(markers=MARKERS.markers, position="predicted"))
    expected = np.zeros((3, 8), dtype=np.int64)
    for trace in traces:
        routing = recorded_routing(model, trace)
        at = trace.token_ids.index(2, trace.prompt_length) - 1
        for layer in range(3):
            expected[layer, routing[layer][at]] += 1
    only_first = MarkerSet(markers=MARKERS.markers, position="predicted", repeats="first")
    found = collect_counts(model, traces, only_first)
    np.testing.assert_array_equal(found.grouped()["joint_GMLE"].sum(0)[1], expected)
    assert before.num_tokens == sum(
        len(set(range(t.prompt_length - 1, len(t.token_ids) - 1)) | {t.prompt_length - 3}) for t in traces
    )
    with pytest.raises(ValueError, match="markers.position is"):
        _ = before + collect_counts(model, traces, MARKERS)


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


def test_counts_that_cannot_be_added_are_refused_before_a_trace_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes hours: what it is to be added to is looked at first."""
    traces = random_traces(4)
    earlier = collect_counts(deepseek_v3(), traces[:2], MARKERS)
    whole = collect_counts(deepseek_v3(), traces[2:], MARKERS, references={}, add_to=[earlier]) + earlier

    def never() -> Iterator[Any]:
        yield pytest.fail("a trace was asked for")

    recorded: dict[str, Any] = {"engine": "endpoint", "references": {}, "add_to": [earlier]}
    shape = model_shape(deepseek_v3())
    with pytest.raises(ValueError, match="would be there twice"):
        count_routed(never(), shape, MARKERS, coming=traces[1:], **recorded)
    with pytest.raises(ValueError, match=r"cannot be added: model\.\w+ is"):
        count_routed(never(), model_shape(qwen3_moe()), MARKERS, coming=traces[2:], **recorded)
    assert whole.num_traces == 4
    monkeypatch.setattr("expert_stats.collect.run_traces", lambda *_, **__: pytest.fail("a trace was run"))
    with pytest.raises(ValueError, match=r"cannot be added: model\.\w+ is .* here and .* there"):
        collect_counts(qwen3_moe(), traces[2:], MARKERS, add_to=[earlier])
    with pytest.raises(ValueError, match="cannot be added: base is 'all' here and 'generated' there"):
        collect_counts(deepseek_v3(), traces[2:], MARKERS, base="all", add_to=[earlier])
    with pytest.raises(
        ValueError, match="would be there twice, with the same text: leave it out, or the counts to add to"
    ):
        collect_counts(deepseek_v3(), traces[1:], MARKERS, add_to=[earlier])
