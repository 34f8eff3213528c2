"""Places at which an expert or atom is tried: its marker in thoughts, elsewhere, injected into neutral texts, and matched tokens.

thought    the marker where thoughts have it (a tag that opens a thought belongs to it)
elsewhere  the same marker in prompts and answers
injected   the marker put into neutral texts, once each, at a place drawn with a fixed seed
matched    other tokens of thoughts: the ten whose number of occurrences there is nearest to the marker's
neutral    all tokens of the neutral texts as they are

And where experts fire there, token by token: counts (`counter`) say how often; `RoutingRecorder` says where, for a few traces that somebody wants
to read.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expert_stats.trace_counts import problem_of
from moe_steer.layers import ModelShape
from moe_steer.tokens import MarkerSet, Trace

CONDITIONS = ("thought", "elsewhere", "injected", "matched", "neutral")
NUM_MATCHED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One sequence with the places of each condition. ``unit``: the problem or text, over which rates are averaged."""

    trace: Trace
    unit: str
    places: dict[str, tuple[int, ...]]


def probes_of(
    traces: Sequence[Trace], texts: Iterable[Sequence[int]], markers: MarkerSet, *, seed: int = 0
) -> tuple[list[Probe], tuple[int, ...]]:
    """The probes of one marker, and the ids of the matched tokens. ``texts``: token ids of neutral texts.

    A place is the last token of an occurrence, which is where the marker is complete. ValueError where the marker stands in no
    thought, and without texts.
    """
    (marker,) = markers.markers
    found: list[Probe] = []
    inside: Counter[int] = Counter()
    forms: Counter[tuple[int, ...]] = Counter()
    for trace in traces:
        spans = markers.find_occurrences(trace.token_ids)[marker.name]
        own = {place for span in spans for place in range(span.start, span.stop)}
        there = [span for span in spans if _in_thought(trace, span.start, span.stop)]
        forms.update(trace.token_ids[span.start : span.stop] for span in there)
        inside.update(trace.token_ids[place] for place in trace.thought or () if place not in own)
        places = {
            "thought": tuple(span.stop - 1 for span in there),
            "elsewhere": tuple(span.stop - 1 for span in spans if span not in there),
        }
        found.append(Probe(trace=trace, unit=problem_of(trace.trace_id), places=places))
    if not forms:
        raise ValueError(
            f"the marker {marker.name!r} stands in no thought of the {len(traces)} traces: give another, or more traces"
        )
    number = forms.total()
    matched = sorted(inside, key=lambda token: (abs(math.log(inside[token] / number)), token))[:NUM_MATCHED]
    for probe in found:
        probe.places["matched"] = tuple(
            place for place in probe.trace.thought or () if probe.trace.token_ids[place] in matched
        )
    form = min(forms, key=lambda one: (-forms[one], one))
    neutral = [list(text) for text in texts if len(text) > 1]
    if not neutral:
        raise ValueError("there are no neutral texts of at least two tokens to put the marker into: give some")
    rng = random.Random(seed)
    for index, ids in enumerate(neutral):
        at = rng.randrange(1, len(ids) + 1)
        injected = (*ids[:at], *form, *ids[at:])
        unit = f"text {index}"
        found.append(
            Probe(trace=_text(f"{unit} injected", injected), unit=unit, places={"injected": (at + len(form) - 1,)})
        )
        found.append(Probe(trace=_text(unit, ids), unit=unit, places={"neutral": tuple(range(len(ids)))}))
    return found, tuple(matched)


def _text(name: str, ids: Iterable[int]) -> Trace:
    return Trace(name, tuple(ids), 0)


def _in_thought(trace: Trace, start: int, stop: int) -> bool:
    thought = trace.thought or range(0)
    return bool(thought) and (
        stop == thought.start or (thought.start <= start and stop <= thought.stop) or start == thought.stop
    )


Array = np.ndarray[Any, Any]


class Firing(NamedTuple):
    """The tokens of one trace at which one expert was selected, in order, and its final weight there."""

    positions_N: Array
    weights_N: Array


TraceFiring = dict[tuple[int, int], Firing]
"""(absolute layer, expert) -> where it fired; experts that never fired in the trace are left out."""


class RoutingRecorder:
    """Announce the traces of a forward pass, run it, and take what fired at the end (the interface of `RoutingCounter`).

    ``experts``: (absolute layer, expert) pairs. ValueError for one that the model has not.
    """

    def __init__(self, shape: ModelShape, experts: Collection[tuple[int, int]]) -> None:
        for layer, expert in experts:
            if layer not in shape.moe_layers or not 0 <= expert < shape.num_experts:
                raise ValueError(
                    f"expert {expert} of layer {layer} does not exist: {shape.model_type} has experts 0-{shape.num_experts - 1} "
                    f"in layers {shape.moe_layers[0] if shape.moe_layers else '-'} to {shape.moe_layers[-1] if shape.moe_layers else '-'}"
                )
        self._wanted: dict[int, Tensor] = {}
        for layer in sorted({layer for layer, _ in experts}):
            named_E = torch.zeros(shape.num_experts + 1, dtype=torch.bool)  # the last: an expert of another rank
            named_E[[expert for at, expert in experts if at == layer]] = True
            self._wanted[layer] = named_E
        self._traces: Sequence[Trace] = ()
        self._width = 0
        self._found: dict[str, TraceFiring] = {}

    def expect(self, traces: Sequence[Trace], width: int) -> None:
        """Announce the next forward pass: one row per trace, right-padded to ``width`` tokens."""
        self._traces, self._width = traces, width
        for trace in traces:
            self._found[trace.trace_id] = {}

    def __call__(self, layer: int, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """Keep the tokens of one layer."""
        if layer not in self._wanted:
            return
        named_E = self._wanted[layer].to(topk_ids_TK.device)
        token_N, slot_N = named_E[topk_ids_TK.clamp(max=len(named_E) - 1)].nonzero(as_tuple=True)
        expert_N = topk_ids_TK[token_N, slot_N].cpu().numpy()
        weight_N = topk_weights_TK[token_N, slot_N].float().cpu().numpy()
        row_N, position_N = np.divmod(token_N.cpu().numpy(), self._width)
        for row, trace in enumerate(self._traces):
            real_N = (row_N == row) & (position_N < len(trace.token_ids))
            for expert in np.unique(expert_N[real_N]).tolist():
                at_N = real_N & (expert_N == expert)
                self._found[trace.trace_id][layer, expert] = Firing(position_N[at_N], weight_N[at_N])

    def finish(self) -> dict[str, TraceFiring]:
        """trace_id -> what fired in it."""
        return self._found
