"""What changes when one model stretches over several ranks: the plan, the counts, and who writes."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from expert_stats import MarkerSet, RoutingCounts, Trace, batches, collect_counts, reduce_counts
from launch.ranks import Ranks
from moe_steer.backends import layout_of, lockstep
from moe_steer.plan import SteeringPlan
from reasoning_evals.runs import RUN_FILE, read_run
from reasoning_evals.whole_files import write_whole

_FOLDERS: list[
    tempfile.TemporaryDirectory[str]
] = []  # they live as long as the process, like the plans that read from them


def agree_on_plan(plan: SteeringPlan | None, ranks: Ranks) -> SteeringPlan:
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
    received = _unpack(*ranks.agree(parcel))
    refuse_different("the steering plan", received.digest(), ranks)
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


def record_start(folder: Path, model: Any, ranks: Ranks) -> None:
    """Add to the ``history`` of run.json, on rank 0, how this start holds the model and on how many ranks.

    Backend and ranks are not part of what a run is: the plan, the problems and the seeds are, and a run may be continued on
    another machine. Which samples came from where can be read from the times.
    """
    if not ranks.is_main:
        return
    run = read_run(folder)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entry = {"backend": layout_of(model).backend, "ranks": ranks.world_size, "started": now}
    run["history"] = [*run.get("history", []), entry]
    write_whole(folder / RUN_FILE, json.dumps(run, indent=1, sort_keys=True) + "\n")


@contextmanager
def unclaimed_when_refused(folder: Path, made: Path, ranks: Ranks) -> Iterator[None]:
    """While directions are made: where they are refused (ValueError) and ``made`` is not there yet, the folder's run.json goes,
    so that a start with another SAE, or with other methods, may use the folder and what was sampled in it so far."""
    try:
        yield
    except ValueError:
        if ranks.is_main and not made.exists():
            (folder / RUN_FILE).unlink(missing_ok=True)
        raise


def refuse_different(what: str, value: Any, ranks: Ranks) -> None:
    """ValueError on every rank when a value that all must share differs between them."""
    if ranks.world_size == 1:
        return
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise ValueError(
            f"{what} differs on rank {odd[0]} ({values[odd[0]]!r}, rank 0 has {values[0]!r}): start all ranks alike"
        )
