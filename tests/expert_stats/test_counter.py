"""The sink itself: bookkeeping of passes, ids that name no expert, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expert_stats import RoutingCounter, Trace
from moe_steer.layers import ModelShape
from stats_helpers import MARKERS

SHAPE = ModelShape(model_type="x", num_layers=3, num_experts=4, top_k=2, moe_layers=(1, 2), hidden_size=8, name="x")
# Two rows padded to 5: the opening tag in the prompt, the response, and padding that must not be counted.
TRACES = [Trace("a", (9, 1, 6, 2), 2), Trace("b", (9, 9, 7, 7, 7), 2)]


def counter() -> RoutingCounter:
    return RoutingCounter(SHAPE, MARKERS)


def routing(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(seed + i))[:2] for i in range(10)])
    return ids, torch.ones(10, 2)


def test_a_pass_is_counted_at_its_announced_tokens() -> None:
    sink = counter()
    sink.expect(TRACES, 5)
    for layer in (1, 2):
        sink(layer, *routing(layer))
    counts = sink.finish()
    assert (counts.num_tokens, counts.num_traces, counts.occurrences_M.tolist()) == (6, 2, [1, 1, 0])
    for index, layer in enumerate((1, 2)):
        ids = routing(layer)[0]
        rows = [1, 2, 3, 7, 8, 9]  # row 0 tokens 1-3, row 1 tokens 2-4
        np.testing.assert_array_equal(
            counts.grouped()["expert_GLE"].sum(0)[index], np.bincount(ids[rows].flatten(), minlength=4)
        )
        np.testing.assert_array_equal(counts.grouped()["joint_GMLE"].sum(0)[0, index], np.bincount(ids[1], minlength=4))
        np.testing.assert_array_equal(counts.grouped()["joint_GMLE"].sum(0)[1, index], np.bincount(ids[3], minlength=4))


def test_passes_add_up_and_the_ids_stay_as_they_are() -> None:
    sink = counter()
    kept = {layer: routing(layer)[0] for layer in (1, 2)}
    for turn in range(3):
        sink.expect([dataclasses.replace(trace, trace_id=f"{trace.trace_id}{turn}") for trace in TRACES], 5)
        for layer in (1, 2):
            sink(layer, kept[layer], torch.ones(10, 2))
    assert sink.finish().num_tokens == 18
    assert all(torch.equal(kept[layer], routing(layer)[0]) for layer in (1, 2))
    assert sink.finish() == sink.finish()
    with pytest.raises(ValueError, match="trace 'a0' was announced before: count every trace once"):
        sink.expect([dataclasses.replace(TRACES[0], trace_id="a0")], 5)


def test_nothing_announced_gives_nothing() -> None:
    assert counter().finish().num_tokens == 0
    with pytest.raises(ValueError, match="layer 1 routed without a pass announced: call expect"):
        counter()(1, *routing(0))


def test_a_layer_that_stays_silent_is_an_error() -> None:
    sink = counter()
    sink.expect(TRACES, 5)
    sink(1, *routing(0))
    with pytest.raises(ValueError, match=r"the layers \[2\] never routed"):
        sink.finish()
    with pytest.raises(ValueError, match=r"the layers \[2\] never routed"):
        sink.expect(TRACES, 5)


def test_a_layer_that_runs_twice_is_an_error() -> None:
    sink = counter()
    sink.expect(TRACES, 5)
    sink(1, *routing(0))
    with pytest.raises(ValueError, match="layer 1 routed without a pass announced"):
        sink(1, *routing(0))


def test_another_batch_than_announced_is_an_error() -> None:
    sink = counter()
    with pytest.raises(ValueError, match="trace 'b' has 5 tokens, the batch 4"):
        sink.expect(TRACES, 4)
    sink = counter()
    sink.expect(TRACES, 6)
    with pytest.raises(ValueError, match=r"layer 1 routed \(10, 2\) \(tokens, top-k\): \(12, 2\) was announced"):
        sink(1, *routing(0))


def test_ids_that_name_no_expert_are_an_error_at_the_end() -> None:
    sink = counter()
    sink.expect(TRACES, 5)
    for layer in (1, 2):
        ids, weights = routing(layer)
        ids[3, 0] = 4
        sink(layer, ids, weights)
    with pytest.raises(ValueError, match=r"layer 1 routed 1 selections to no expert \(ids >= 4\)"):
        sink.finish()
