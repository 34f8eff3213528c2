"""One plan and one count over several ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_stats import MarkerSet, RoutingCounts, Trace, batches, collect_counts, reduce_counts
from launch.core.ranks import Ranks
from moe_steer import SteeringPlan
from moe_steer.backends import layout_of, lockstep

_FOLDERS: list[
    tempfile.TemporaryDirectory[str]
] = []  # they live as long as the process, like the plans that read from them


def broadcast_plan(plan: SteeringPlan | None, ranks: Ranks) -> SteeringPlan:
    """Rank 0's plan on every rank, residual vectors included; ValueError on every rank where what arrived differs.

    Other ranks may pass None: their files are not read, so another node need not see rank 0's disk.
    """
    if ranks.world_size == 1:
        assert plan is not None
        return plan
    parcel = None
    if ranks.is_main:
        assert plan is not None
        parcel = (plan.to_dict(), [plan.vector_path(item).read_bytes() for item in plan.residual])
    received = _unpack(*ranks.broadcast(parcel))
    ranks.assert_same("the steering plan", received.digest())
    return plan if ranks.is_main and plan is not None else received


def _unpack(data: dict[str, Any], vectors: list[bytes]) -> SteeringPlan:
    entries = [dict(item, file=f"vector{number}.safetensors") for number, item in enumerate(data["residual"])]
    folder = "."
    if vectors:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="plan-"))
        folder = _FOLDERS[-1].name
    for entry, content in zip(entries, vectors, strict=True):
        Path(folder, entry["file"]).write_bytes(content)
    return SteeringPlan.from_dict({**data, "residual": entries}, base_dir=folder)


def collect_over_ranks(
    model: Any,
    traces: Sequence[Trace],
    markers: MarkerSet,
    ranks: Ranks,
    *,
    tokens_per_batch: int = 8192,
    **options: Any,
) -> RoutingCounts:
    """The counts of all traces, on every rank, the same to the bit on any number of ranks.

    Every rank is given all traces. Where one model stretches over the ranks, each of them sees every token: all count, and one
    count is the result. Elsewhere the batches are dealt out and the counts summed.
    """
    layout = layout_of(model)
    if layout.same_tokens or ranks.world_size == 1:
        return collect_counts(model, traces, markers, tokens_per_batch=tokens_per_batch, **options)
    index, number = layout.share
    dealt = list(batches(traces, tokens_per_batch))[index::number]
    own = [trace for batch in dealt for trace in batch]
    with lockstep(model):
        counts = collect_counts(model, own, markers, tokens_per_batch=tokens_per_batch, allow_empty=True, **options)
    return reduce_counts(counts)
