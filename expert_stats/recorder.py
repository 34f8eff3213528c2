"""Where experts fire, token by token: a sink for `observe_routing` that keeps the tokens of named experts with their weights.

Counts (`counter`) say how often; this says where, for a few traces that somebody wants to read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_steer.layers import ModelShape
from moe_steer.tokens import Trace

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
