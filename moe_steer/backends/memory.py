"""Which backend fits, and the fastest that does: weights, cache and activations of one rank, from a model's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_steer.backends import device_map
from moe_steer.backends.allocations import Unplanned
from moe_steer.backends.blueprint import (
    BLOCKS,
    in_blocks,
    planning,
    quantisation,
    skeleton,
    stored_dtype,
    torch_dtype,
)
from moe_steer.backends.checkpoint import stays_packed
from moe_steer.backends.layout import FEWER, FITS, available_bytes, gib, gpus_here, host_bytes
from moe_steer.backends.registry import BACKENDS, refusal
from moe_steer.backends.rehearsal import Rehearsed, rehearse, rehearse_step
from moe_steer.backends.shards import cache_parts, latent_copies, shard_of

_SMALLEST_FIRST = ("device_map", "tp_ep", "zero3", "plain")
"""What to take when the memory is not known: the fastest of those that share the weights."""
_RANKS_TO_TRY = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on the device of the fullest rank under one backend; ``why_not``: the reason if it cannot run at all; ``places``:
    for device_map, where the modules rest."""

    backend: str
    weights: int = 0
    gathered: int = 0
    cache: int = 0
    activations: int = 0
    host: int = 0
    loading: int = 0
    fits: bool = False
    why_not: str = ""
    places: device_map.Placement | None = None

    @property
    def total(self) -> int:
        """Bytes that must fit on the device at once."""
        return self.weights + self.gathered + self.cache + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Footprints of all backends, fastest first, and what to change when none fits."""

    footprints: tuple[Footprint, ...]
    limit: int
    world_size: int
    advice: str = ""

    @property
    def fastest(self) -> Footprint | None:
        """The fastest backend that fits."""
        return next((item for item in self.footprints if item.fits), None)


def plan_memory(
    config: Any,
    world_size: int,
    limit: int,
    *,
    dtype: str = "auto",
    context: int = 32768,
    batch: int = 1,
    prompt: int = 1024,
    offload: str = "",
    host_limit: int | None = None,
    on_gpu: bool = True,
    max_memory: str = "",
    gpus: Sequence[int] | None = None,
) -> MemoryPlan:
    """Footprints of a model under every backend.

    ``limit``: bytes of one rank's device; ``context``: tokens a sequence may reach; ``batch``: sequences decoded together on a
    rank; ``prompt``: tokens of the longest prompt, processed at once; ``dtype``: auto (as stored), fp8, or a torch name;
    ``host_limit``: limit of one rank's CPU memory while loading; None: no limit. For device_map: ``max_memory`` is what weights
    may fill on each device (see ``device_map.place``), ``gpus`` the limits of the GPUs of its one process; None: one of
    ``limit`` in a run of one rank, none where no GPU computes. ``Unplanned`` where the library's code does not run without data,
    a configuration says what no model can have, or another package packs the weights.
    """
    if world_size < 1 or limit <= 0 or context < 1 or batch < 1:
        raise ValueError(f"{world_size} ranks, {limit} bytes, context {context}, batch {batch}: all must be positive")
    torch_dtype("bfloat16" if dtype == "fp8" else dtype)
    if gpus is None and world_size == 1:
        gpus = (limit,) if on_gpu else ()
    if (method := quantisation(config)) not in ("", *BLOCKS):
        raise Unplanned(f"the size of {method} weights is not planned")
    with planning(config):
        stored = skeleton(config, dtype)
        packed = dtype == "fp8" or (dtype == "auto" and in_blocks(config))
        expanded = skeleton(config, _whole(config, dtype)) if packed else stored
        run = rehearse(expanded, batch, min(prompt, context), on_gpu)
        step = rehearse_step(expanded, batch, context, on_gpu)
        run = run._replace(activations=max(run.activations, step.activations))
    cache, kept = max(step.cache, run.cache), stays_packed(config, dtype, on_gpu)
    work = _Work(config, stored, expanded, run, cache, limit, offload, host_limit, kept, max_memory, gpus)
    order = BACKENDS if world_size == 1 else (*(b for b in BACKENDS if b != "device_map"), "device_map")
    footprints = tuple(work.footprint(backend, world_size) for backend in order)
    plan = MemoryPlan(footprints=footprints, limit=limit, world_size=world_size)
    return plan if plan.fastest else dataclasses.replace(plan, advice=work.advice(world_size))


def choose_backend(
    config: Any,
    world_size: int,
    dtype: str,
    offload: str,
    limit: int | None = None,
    on_gpu: bool | None = None,
    *,
    batch: int = 1,
    context: int | None = None,
    prompt: int = 1024,
    max_memory: str = "",
    rests: bool = True,
    gpus: Sequence[int] | None = None,
) -> tuple[str, str]:
    """(backend, reason in one line) of the fastest layout that fits the memory of this machine's GPUs, or of the CPU; with
    ``limit``, of a machine where each rank may use so many bytes, and a single process those of ``gpus``. ``batch`` rows of
    ``context`` tokens (default the model's, at most 32,768) are decoded together, after prompts of ``prompt`` tokens. One
    process whose GPUs are too small gets device_map as if ``offload`` were ``cpu``, if ``rests``. Where the memory cannot be
    planned, the first backend that can run the model: nothing says that it does not fit."""
    elsewhere = limit is not None
    limit, where = (limit, "memory") if limit is not None else available_bytes(world_size)
    asked: dict[str, Any] = {
        "dtype": dtype,
        "context": context or _context(config),
        "batch": batch,
        "prompt": prompt,
        "host_limit": None if elsewhere else host_bytes(world_size),
        "on_gpu": torch.cuda.is_available() if on_gpu is None else on_gpu,
        "max_memory": max_memory,
        "gpus": gpus if elsewhere or world_size > 1 else gpus_here(),
    }
    try:
        plan = plan_memory(config, world_size, limit, offload=offload, **asked)
    except Unplanned as error:
        return _without_plan(config, world_size, offload, max_memory, str(error))
    best = plan.fastest
    if best is None and rests and world_size == 1 and asked["on_gpu"] and not offload:
        rest = plan_memory(config, world_size, limit, offload="cpu", **asked)
        best = next((item for item in rest.footprints if item.backend == "device_map" and item.fits), None)
    if best is not None and best.places:
        return best.backend, f"{best.backend}: {FITS}, weights on {best.places}"
    if best is None:
        raise ValueError(f"no backend fits {gib(limit)} GiB a rank ({where}): {plan.advice}")
    reason = f"{best.backend}: {FITS}, {gib(best.total)} of {gib(limit)} GiB a rank ({where}), {world_size} ranks"
    return best.backend, reason.replace("1 ranks", "1 rank") if world_size == 1 else reason


def _without_plan(config: Any, world_size: int, offload: str, max_memory: str, why: str) -> tuple[str, str]:
    able = [backend for backend in _SMALLEST_FIRST if not refusal(backend, config, world_size)]
    whole = world_size == 1 and not offload and not max_memory
    best = "plain" if whole else "zero3" if offload and world_size > 1 else able[0]
    others = ", ".join(backend for backend in able if backend != best)
    return best, f"{best}: {why}" + (f"; where it does not fit, give --backend {others}" if others else "")


def _whole(config: Any, dtype: str) -> str:
    """The precision to which blocks of few bits are expanded."""
    return "bfloat16" if dtype == "fp8" else str(stored_dtype(config)).removeprefix("torch.")


def place_here(
    config: Any, dtype: str, offload: str, max_memory: str, *, batch: int = 1, context: int | None = None
) -> dict[str, int | str]:
    """Where each module rests on this machine under device_map; see ``plan_memory``. ValueError where there is no room."""
    gpus, host = gpus_here(), host_bytes(1)
    named = device_map.check_max_memory(max_memory) if max_memory else {}
    if absent := [device for device in named if isinstance(device, int) and device >= len(gpus)]:
        raise ValueError(f"max_memory names GPU {absent[0]}, this machine has {len(gpus)} GPUs: leave it out")
    if not named:  # else there is nothing to plan: the work of the forward is not asked about
        asked: dict[str, Any] = {"dtype": dtype, "context": context or _context(config), "batch": batch, "gpus": gpus}
        try:
            plan = plan_memory(
                config, 1, max((host, *gpus)), offload=offload, host_limit=host, on_gpu=bool(gpus), **asked
            )
        except Unplanned:  # a quarter is left to the work, whose size is not known
            host, gpus = host * 3 // 4, tuple(size * 3 // 4 for size in gpus)
        else:
            found = next(item for item in plan.footprints if item.backend == "device_map")
            if found.places is None:
                raise ValueError(found.why_not)
            return found.places.modules
    expands = in_blocks(config) and dtype == "auto" and not stays_packed(config, dtype, bool(gpus))
    with planning(config):
        model = skeleton(config, _whole(config, dtype) if expands else dtype)
    host = host if offload or not gpus else 0
    return device_map.place(model, gpus, host, offload not in ("", "cpu"), asked=max_memory).modules


def _context(config: Any) -> int:
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096, 32768)


@dataclass(frozen=True)
class _Work:
    """One model and one workload; ``footprint`` gives the memory for any number of ranks."""

    config: Any
    stored: Any
    expanded: Any
    run: Rehearsed
    cache: int
    limit: int
    offload: str
    host_limit: int | None
    packed: bool
    max_memory: str
    gpus: Sequence[int] | None

    def footprint(self, backend: str, world_size: int) -> Footprint:
        one_process = backend == "device_map" and self.gpus is not None
        why_not = refusal(backend, self.config, 1 if one_process else world_size)
        if not why_not and self.offload and backend not in ("zero3", "device_map"):
            why_not = "offload is a feature of zero3 and device_map"
        if not why_not and self.max_memory and backend != "device_map":
            why_not = "max_memory is a feature of device_map"
        if why_not:
            return Footprint(backend=backend, why_not=why_not)
        if one_process:
            return self._in_one_process()
        keeps_blocks = self.packed and backend in ("plain", "tp_ep")
        model = self.stored if keeps_blocks else self.expanded
        shard = shard_of(model, backend, world_size, self.offload)
        cache = self.cache // cache_parts(self.expanded, world_size) if backend == "tp_ep" else self.cache
        found = Footprint(
            backend=backend,
            weights=0 if self.offload else shard.weights,
            gathered=shard.gathered,
            cache=cache,
            activations=self.run.activations + (latent_copies(self.config) if keeps_blocks else 0),
            host=shard.host,
            loading=shard.loading,
        )
        if self.host_limit is not None and found.loading > self.host_limit:
            need = f"loading needs {gib(found.loading)} GiB of CPU memory a rank, there are {gib(self.host_limit)}"
            return dataclasses.replace(found, why_not=need)
        return dataclasses.replace(found, fits=found.total <= self.limit)

    def _in_one_process(self) -> Footprint:
        """Under device_map; the numbers are of the first device, which also computes the layers that rest elsewhere."""
        assert self.gpus is not None
        try:
            found = device_map.place(
                self.stored if self.packed else self.expanded,
                self.gpus,
                self.host_limit if self.offload or not self.gpus else 0,
                self.offload not in ("", "cpu"),
                cache=self.cache,
                activations=self.run.activations,
                asked=self.max_memory,
            )
        except ValueError as error:
            return Footprint(backend="device_map", why_not=str(error))
        first = next(iter(found.held))
        parts = sum(isinstance(device, int) for device in found.held) if not found.largest else 1
        host = found.held.get("cpu", 0) if first != "cpu" else 0
        return Footprint(
            backend="device_map",
            weights=found.held[first],
            gathered=found.largest,
            cache=self.cache // max(parts, 1),
            activations=self.run.activations,
            host=host,
            loading=host + found.largest,
            fits=True,
            places=found,
        )

    def advice(self, world_size: int) -> str:
        """What to change when nothing fits, most effective first."""
        found = []
        for number in _RANKS_TO_TRY:
            fitting = [b for b in BACKENDS if number != world_size and self.footprint(b, number).fits]
            if fitting:
                found.append(f"{number} GPUs of this size ({fitting[0]})")
                break
        if self.run.activations + self.cache > self.limit // 4:
            found.append(FEWER)
        if not self.packed and not in_blocks(self.config):  # a checkpoint that is expanded here is already small
            found.append("an FP8 checkpoint with tp_ep")
        if not self.offload:
            found.append(f"{'device_map' if world_size == 1 else 'zero3'} with --offload cpu")
        return "use " + ", or ".join(found)
