"""Counts routing while a model runs: a sink for `observe_routing` that adds up on the device, O(G x M x L x E) memory.

Also which positions of a trace are counted: the base (all tokens of the response) and the positions of every marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expert_stats.counts import CountsSignature, RoutingCounts, group_of
from moe_steer.layers import ModelShape
from moe_steer.tokens import MarkerSet, Trace

BASES = ("generated", "all")


class Sites(NamedTuple):
    """Positions, sorted and distinct. Every position of a marker is also in the base, so that joint <= expert <= total holds."""

    base: np.ndarray[Any, Any]
    readings: tuple[np.ndarray[Any, Any], ...]


def count_sites(trace: Trace, markers: MarkerSet, *, base: str = "generated", prompt_tail: int = 4) -> Sites:
    """Positions of one trace at which routing is counted.

    ``base``: "generated" (RICE: the tokens of the response) or "all" (the prompt as well). ``prompt_tail``: a marker in the
    prompt is counted with base "generated" only among the prompt's last so many tokens, where chat templates open the
    thought (R1's ends in `<think>` and a newline); earlier markers are part of the question. With markers read where they
    are "predicted", every position is the one before its token, for the base as well.
    """
    first = 0 if base == "all" else trace.prompt_length
    first_marker = 0 if base == "all" else max(0, trace.prompt_length - prompt_tail)
    back = 1 if markers.position == "predicted" else 0
    readings = []
    for spans in markers.find_occurrences(trace.token_ids).values():
        anchors = [span.stop - 1 if markers.token == "last" else span.start for span in spans]
        kept = [anchor - back for anchor in anchors if anchor >= max(first_marker, back)]
        readings.append(np.array(kept[:1] if markers.repeats == "first" else kept, dtype=np.int64))
    response = np.arange(max(first - back, 0), len(trace.token_ids) - back, dtype=np.int64)
    return Sites(np.unique(np.concatenate([response, *readings])), tuple(readings))


class _Forward(NamedTuple):
    """Positions of the next forward pass: rows of its flattened batch, and the table row to which each of them is added."""

    num_tokens: int
    tokens_N: Tensor
    rows_N1: Tensor


class RoutingCounter:
    """A sink for `moe_steer.observe_routing`. Announce the traces of a forward pass, run it, and take the counts at the end::

    counter = RoutingCounter(model_shape(model), markers)
    with observe_routing(model, counter):
        counter.expect(traces, width)          # right-padded to ``width`` tokens, in this order
        model(input_ids, attention_mask=mask)
    counts = counter.finish()
    """

    def __init__(
        self,
        shape: ModelShape,
        markers: MarkerSet,
        *,
        base: str = "generated",
        prompt_tail: int = 4,
        num_groups: int = 16,
        routers: str = "",
        versions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        if base not in BASES:
            raise ValueError(f"base is {base!r}: choose one of {', '.join(BASES)}")
        if prompt_tail < 0 or num_groups < 1:
            raise ValueError(f"prompt_tail is {prompt_tail} and num_groups {num_groups}: give at least 0 and 1")
        if not shape.moe_layers:
            raise ValueError(f"{shape.model_type} is a dense model: there is no routing to count")
        self._shape = shape
        self._markers = markers
        self._base = base
        self._prompt_tail = prompt_tail
        signature = CountsSignature(
            model=shape.to_dict(), markers=markers.to_dict(), base=base, prompt_tail=prompt_tail, routers=routers
        )
        self._counts = RoutingCounts.zeros(signature, num_groups, versions)
        # One flat table per layer: G rows of base counts, then G x M rows of joint counts. Its last column is for ids of no
        # expert (id E means "on another rank" under expert parallelism), so that they are not counted for one.
        self._table_rows = num_groups * (1 + len(markers.markers))
        self._columns = shape.num_experts + 1
        self._tables: dict[int, Tensor] = {}
        self._forward: _Forward | None = None
        self._on_device: dict[torch.device, _Forward] = {}
        self._waiting: set[int] = set()

    def expect(self, traces: Sequence[Trace], width: int) -> None:
        """Announce the next forward pass: one row per trace, right-padded to ``width`` tokens."""
        self._refuse_missing_layers()
        num_groups, num_markers = self._counts.num_groups, len(self._markers.markers)
        tokens, rows = [], []
        for row, trace in enumerate(traces):
            if len(trace.token_ids) > width:
                raise ValueError(
                    f"trace {trace.trace_id!r} has {len(trace.token_ids)} tokens, the batch {width}: pad to the longest"
                )
            sites = count_sites(trace, self._markers, base=self._base, prompt_tail=self._prompt_tail)
            group = group_of(trace.trace_id, num_groups)
            self._counts.num_traces_G[group] += 1
            self._counts.total_G[group] += len(sites.base)
            tokens.append(sites.base + row * width)
            rows.append(np.full(len(sites.base), group))
            for index, reading in enumerate(sites.readings):
                self._counts.marker_GM[group, index] += len(reading)
                tokens.append(reading + row * width)
                rows.append(np.full(len(reading), num_groups + group * num_markers + index))
        self._forward = _Forward(
            len(traces) * width,
            torch.from_numpy(np.concatenate(tokens)),
            torch.from_numpy(np.concatenate(rows) * self._columns)[:, None],
        )
        self._on_device = {}
        self._waiting = set(self._shape.moe_layers)

    def __call__(self, layer: int, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """Add the routing of one layer; no data leaves the device, and no call waits for it."""
        forward = self._expected(layer, topk_ids_TK)
        table = self._tables.get(layer)
        if table is None:
            size = self._table_rows * self._columns
            table = self._tables[layer] = torch.zeros(size, dtype=torch.int64, device=topk_ids_TK.device)
        cells_NK = topk_ids_TK.index_select(0, forward.tokens_N).clamp_(max=self._columns - 1).add_(forward.rows_N1)
        table.index_add_(0, cells_NK.view(-1), table.new_ones(()).expand(cells_NK.numel()))

    def finish(self) -> RoutingCounts:
        """The counts of all passes so far, on the CPU, checked."""
        self._refuse_missing_layers()
        num_groups = self._counts.num_groups
        expert_GLE, joint_GMLE = self._counts.expert_GLE.copy(), self._counts.joint_GMLE.copy()
        for index, layer in enumerate(self._shape.moe_layers):
            if layer not in self._tables:
                continue  # no pass was announced: zero counts
            table = self._tables[layer].view(self._table_rows, self._columns).cpu().numpy()
            if table[:, -1].any():
                raise ValueError(
                    f"layer {layer} routed {table[:num_groups, -1].sum()} selections to no expert (ids >= {self._shape.num_experts}): "
                    "this build hides experts of other processes; count in one process or with global ids"
                )
            expert_GLE[:, index] = table[:num_groups, :-1]
            joint_GMLE[:, :, index] = table[num_groups:, :-1].reshape(num_groups, -1, self._shape.num_experts)
        result = RoutingCounts(
            signature=self._counts.signature,
            joint_GMLE=joint_GMLE,
            expert_GLE=expert_GLE,
            marker_GM=self._counts.marker_GM.copy(),
            total_G=self._counts.total_G.copy(),
            num_traces_G=self._counts.num_traces_G.copy(),
            versions=self._counts.versions,
        )
        return result.check()

    def _expected(self, layer: int, topk_ids_TK: Tensor) -> _Forward:
        if self._forward is None or layer not in self._waiting:
            raise ValueError(
                f"layer {layer} routed without a pass announced: call expect(traces, width) before every forward"
            )
        self._waiting.discard(layer)
        wanted = (self._forward.num_tokens, self._shape.top_k)
        if tuple(topk_ids_TK.shape) != wanted:
            raise ValueError(f"layer {layer} routed {tuple(topk_ids_TK.shape)} (tokens, top-k): {wanted} was announced")
        device = topk_ids_TK.device
        if device not in self._on_device:
            moved = (
                self._forward.tokens_N.to(device, non_blocking=True),
                self._forward.rows_N1.to(device, non_blocking=True),
            )
            self._on_device[device] = _Forward(self._forward.num_tokens, *moved)
        return self._on_device[device]

    def _refuse_missing_layers(self) -> None:
        if self._waiting:
            raise ValueError(
                f"the layers {sorted(self._waiting)} never routed in the pass announced: the counts are not complete"
            )
