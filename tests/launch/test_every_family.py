"""The whole way of every family that the library has, from a checkpoint on disk, by path and with default options.

Each step is held to a second opinion: the model that was saved, the cache of a real forward, the naive experts, the routing
that was observed. Sampling and grading belong behind ``counted``.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from expert_stats import MarkerSet, Trace, collect_counts
from families import FAMILIES, REFUSED, available, batch, build
from family_cases import blocks_of, busiest, collect_routing, logits
from family_checkpoints import checkpoint
from moe_steer import ExpertGain, SteeringPlan, load_model, steer
from moe_steer.backends import plan_memory
from moe_steer.backends.rehearsal import _bytes_of
from naive_experts import naive_steering

ROWS, CONTEXT = 2, 96
"""Longer than the windows of the tiny families (64)."""


@pytest.mark.parametrize("name", available())
def test_the_whole_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(name)
    if name in REFUSED:
        with pytest.raises(
            ValueError, match=rf"{re.escape(REFUSED[name])}.*; to measure it as it is, serve it"
        ) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        return
    model, tokenizer = load_model(folder)
    assert "cannot be planned" not in capsys.readouterr().err
    loaded(name, model)
    planned(model)
    steered(name, model)
    counted(model, tokenizer)


def loaded(name: str, model: Any) -> None:
    """Every tensor is the one that was saved, under the same class."""
    built = build(name)
    assert type(model) is type(built)
    stored, read = built.state_dict(), model.state_dict()
    assert stored.keys() == read.keys()
    assert [key for key in stored if not torch.equal(stored[key], read[key])] == []


def planned(model: Any) -> None:
    """The plan's cache is the one that a real prefill and a real step leave, to the byte."""
    plan = plan_memory(model.config, 1, 2**34, context=CONTEXT, batch=ROWS, prompt=8, on_gpu=False)
    assert plan.footprints[0].weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    ids_BS = batch(ROWS, CONTEXT)
    cache = None
    for part in (slice(CONTEXT - 1), slice(CONTEXT - 1, CONTEXT)):
        with torch.no_grad():
            cache = model(
                input_ids=ids_BS[:, part],
                attention_mask=torch.ones((ROWS, part.stop), dtype=torch.long),
                position_ids=torch.arange(CONTEXT).expand(ROWS, -1)[:, part],
                past_key_values=cache,
                use_cache=True,
            ).past_key_values
    assert plan.footprints[0].cache == _bytes_of(cache)


def steered(name: str, model: Any) -> None:
    """Steering the busiest expert gives what the naive experts give."""
    ids_BS, blocks = batch(), blocks_of(model)
    with collect_routing(model) as routing:
        before = logits(model, ids_BS)
    assert tuple(routing) == FAMILIES[name].moe_layers, "observed"
    first = min(routing)
    gains = {(first, busiest(routing[first][0][0])[0]): 8.0}
    with naive_steering(model, name, blocks, gains, False):
        expected = logits(model, ids_BS)
    with steer(
        model, SteeringPlan(experts=[ExpertGain(layer, e, gain) for (layer, e), gain in gains.items()])
    ) as audit:
        found = logits(model, ids_BS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert not torch.equal(found, before)
    assert all(fired.tokens > 0 for fired in audit.fired.values())


def counted(model: Any, tokenizer: Any) -> None:
    """The counts of a trace are those of the routing that an own forward shows."""
    ids = tokenizer.encode("2+40 is 42. Wait, 2+40=42?", add_special_tokens=False)
    place = ids.index(tokenizer.convert_tokens_to_ids("\u0120Wait"))
    markers = MarkerSet.from_tokenizer(tokenizer, ["Wait"])
    counts = collect_counts(model, [Trace("a#0", tuple(ids), 4)], markers)
    with collect_routing(model) as routing:
        logits(model, torch.tensor([ids]))
    for row, (ids_TK, _) in enumerate(calls[0] for calls in routing.values()):
        here = torch.bincount(ids_TK[place], minlength=counts.joint_GMLE.shape[-1])
        assert counts.joint_GMLE.sum(0)[0, row].tolist() == here.tolist()
