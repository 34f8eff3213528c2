"""Counts routing while a model runs: a sink for `observe_routing` that adds up one pass on the device, and packs it.

Also which positions of a trace are counted: the base (all tokens of the response) and the positions of every marker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expert_stats.counts import RoutingCounts, sum_counts
from expert_stats.counts_files import CountsSignature
from expert_stats.trace_counts import NUM_BINS, References, TraceCounts, bins_of
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


class _Waiting(NamedTuple):
    """A trace of the pass under way: what is known of it before its routing."""

    trace: Trace
    total_B: np.ndarray[Any, Any]
    marker_MB: np.ndarray[Any, Any]


def trace_digest(trace: Trace) -> str:
    """A fingerprint of the text of a trace: the same id with another text is another trace."""
    ids = np.array([trace.prompt_length, *trace.token_ids], dtype="<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:32]


class RoutingCounter:
    """A sink for `moe_steer.observe_routing`. Announce the traces of a forward pass, run it, and take the counts at the end::

    counter = RoutingCounter(model_shape(model), markers)
    with observe_routing(model, counter):
        counter.expect(traces, width)          # right-padded to ``width`` tokens, in this order
        model(input_ids, attention_mask=mask)
    counts = counter.finish()

    The counts of a pass stay on the device until the next one is announced, and are packed on the host then. ``references``:
    token id -> text of the reference tokens (`reference_tokens`), counted over all traces. ValueError for a trace announced
    twice.
    """

    def __init__(
        self,
        shape: ModelShape,
        markers: MarkerSet,
        *,
        base: str = "generated",
        prompt_tail: int = 4,
        references: Mapping[int, str] | None = None,
        routers: str = "",
        versions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        if base not in BASES:
            raise ValueError(f"base is {base!r}: choose one of {', '.join(BASES)}")
        if prompt_tail < 0:
            raise ValueError(f"prompt_tail is {prompt_tail}: give at least 0")
        if not shape.moe_layers:
            raise ValueError(f"{shape.model_type} is a dense model: there is no routing to count")
        self._shape = shape
        self._markers = markers
        self._base = base
        self._prompt_tail = prompt_tail
        self._references = dict(sorted((references or {}).items()))
        self._signature = CountsSignature(
            model=shape.to_dict(), markers=markers.to_dict(), base=base, prompt_tail=prompt_tail, routers=routers
        )
        self._versions = versions or {}
        # The last column of a table is for ids of no expert (id E means "on another rank" under expert parallelism), so that
        # they are not counted for one. Its rows: the references (over all passes), then B + M rows for each trace of the pass.
        self._columns = shape.num_experts + 1
        self._rows_of_trace = NUM_BINS + len(markers.markers)
        self._seen_R = np.zeros(len(self._references), np.int64)
        self._joint_RLE = np.zeros((len(self._references), len(shape.moe_layers), shape.num_experts), np.int64)
        self._tables: dict[int, Tensor] = {}
        self._batch: list[_Waiting] = []
        self._done: list[TraceCounts] = []
        self._announced: set[tuple[str, str]] = set()
        self._forward: _Forward | None = None
        self._on_device: dict[torch.device, _Forward] = {}
        self._waiting: set[int] = set()

    def refuse_addition(self, earlier: Sequence[RoutingCounts], traces: Sequence[Trace]) -> None:
        """ValueError where what will be counted of these traces could not be added to earlier counts."""
        sum_counts([RoutingCounts.zeros(self._signature), *earlier])
        held = {trace.key for counts in earlier for trace in counts.traces}
        for trace in traces:
            if (trace.trace_id, trace_digest(trace)) in held:
                raise ValueError(
                    f"trace {trace.trace_id!r} would be there twice, with the same text: leave it out, or the counts to add to"
                )

    def expect(self, traces: Sequence[Trace], width: int) -> None:
        """Announce the next forward pass: one row per trace, right-padded to ``width`` tokens."""
        self._flush()
        for trace in traces:
            if len(trace.token_ids) > width:
                raise ValueError(
                    f"trace {trace.trace_id!r} has {len(trace.token_ids)} tokens, the batch {width}: pad to the longest"
                )
            key = (trace.trace_id, trace_digest(trace))
            if key in self._announced:
                raise ValueError(f"trace {trace.trace_id!r} was announced before: count every trace once")
            self._announced.add(key)
        tokens: list[np.ndarray[Any, Any]] = []
        rows: list[np.ndarray[Any, Any]] = []
        for row, trace in enumerate(traces):
            self._announce(trace, row * width, len(self._references) + row * self._rows_of_trace, tokens, rows)
        self._forward = _Forward(
            len(traces) * width,
            torch.from_numpy(np.concatenate(tokens)),
            torch.from_numpy(np.concatenate(rows) * self._columns)[:, None],
        )
        self._on_device = {}
        self._waiting = set(self._shape.moe_layers)

    def _announce(self, trace: Trace, start: int, first_row: int, tokens: list[Any], rows: list[Any]) -> None:
        """Where one trace is counted: base tokens by bin, markers, references."""
        sites = count_sites(trace, self._markers, base=self._base, prompt_tail=self._prompt_tail)
        back = 1 if self._markers.position == "predicted" else 0
        place = (trace.prompt_length, len(trace.token_ids), back)
        bins_N = bins_of(sites.base, *place)
        tokens.append(sites.base + start)
        rows.append(first_row + bins_N)
        marker_MB = np.zeros((len(sites.readings), NUM_BINS), np.int64)
        for index, reading in enumerate(sites.readings):
            marker_MB[index] = np.bincount(bins_of(reading, *place), minlength=NUM_BINS)
            tokens.append(reading + start)
            rows.append(np.full(len(reading), first_row + NUM_BINS + index))
        self._batch.append(_Waiting(trace, np.bincount(bins_N, minlength=NUM_BINS), marker_MB))
        if self._references:
            known_R = np.fromiter(self._references, np.int64)
            ids_N = np.asarray(trace.token_ids, np.int64)[sites.base + back]
            found_N = np.minimum(np.searchsorted(known_R, ids_N), len(known_R) - 1)
            at_N = np.flatnonzero((known_R[found_N] == ids_N) & ~np.isin(sites.base, np.concatenate(sites.readings)))
            self._seen_R += np.bincount(found_N[at_N], minlength=len(known_R))
            tokens.append(sites.base[at_N] + start)
            rows.append(found_N[at_N])

    def __call__(self, layer: int, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """Add the routing of one layer; no data leaves the device, and no call waits for it."""
        forward = self._expected(layer, topk_ids_TK)
        size = (len(self._references) + len(self._batch) * self._rows_of_trace) * self._columns
        table = self._tables[layer] = torch.zeros(size, dtype=torch.int32, device=topk_ids_TK.device)
        cells_NK = topk_ids_TK.index_select(0, forward.tokens_N).clamp_(max=self._columns - 1).add_(forward.rows_N1)
        table.index_add_(0, cells_NK.view(-1), table.new_ones(()).expand(cells_NK.numel()))

    def _flush(self) -> None:
        """Pack the counts of the pass that ran."""
        self._refuse_missing_layers()
        if not self._batch:
            return
        num_references, sizes = len(self._references), (len(self._batch), self._rows_of_trace)
        batch_NRLE = np.zeros((*sizes, len(self._shape.moe_layers), self._columns - 1), np.int32)
        for index, layer in enumerate(self._shape.moe_layers):
            table = self._tables[layer].view(-1, self._columns).cpu().numpy()
            if table[:, -1].any():
                raise ValueError(
                    f"layer {layer} routed {_lost(table[num_references:, -1].reshape(sizes))} selections to no expert "
                    f"(ids >= {self._shape.num_experts}): this build hides experts of other processes; count in one process or "
                    "with global ids"
                )
            self._joint_RLE[:, index] += table[:num_references, :-1]
            batch_NRLE[:, :, index] = table[num_references:, :-1].reshape(*sizes, -1)
        for (trace, total_B, marker_MB), counted in zip(self._batch, batch_NRLE, strict=True):
            self._done.append(
                TraceCounts.pack(
                    trace.trace_id,
                    counted[:NUM_BINS],
                    counted[NUM_BINS:],
                    marker_MB,
                    total_B,
                    digest=trace_digest(trace),
                    family=trace.family or "",
                )
            )
        self._tables, self._batch = {}, []

    def finish(self) -> RoutingCounts:
        """The counts of all passes so far, on the CPU, checked."""
        self._flush()
        names = tuple(self._references), tuple(self._references.values())
        return RoutingCounts(
            signature=self._signature,
            traces=tuple(self._done),
            references=References(*names, self._joint_RLE.copy(), self._seen_R.copy()) if self._done else None,
            versions=self._versions,
        ).check()

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


def _lost(table: np.ndarray[Any, Any]) -> int:
    """Selections at base tokens: those at markers are among them."""
    return int(table[:, :NUM_BINS].sum())
