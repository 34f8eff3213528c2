"""Which backend fits, and the fastest that does: weights, cache and activations of one rank, from a model's configuration."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from moe_steer.backends.blueprint import Unplanned, in_blocks, is_mxfp4, planning, skeleton, torch_dtype
from moe_steer.backends.checkpoint import has_fp8_hardware, has_mxfp4_kernels
from moe_steer.backends.layout import local_ranks
from moe_steer.backends.registry import BACKENDS, refusal
from moe_steer.backends.rehearsal import Rehearsed, rehearse, rehearse_step
from moe_steer.backends.shards import shard_of
from moe_steer.backends.tp_ep import parallel_rules

GPU_SHARE = 0.92
"""Part of a GPU that tensors may fill; the rest is left to the CUDA context, the communication library and fragmentation."""
_SMALLEST_FIRST = ("tp_ep", "zero3", "plain")
"""What to take on several ranks when the memory is not known: the fastest of those that share the weights."""
_RANKS_TO_TRY = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on the device of the fullest rank under one backend; ``why_not``: the reason if it cannot run at all."""

    backend: str
    weights: int = 0
    gathered: int = 0
    cache: int = 0
    activations: int = 0
    host: int = 0
    loading: int = 0
    fits: bool = False
    why_not: str = ""

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
) -> MemoryPlan:
    """Footprints of a model under every backend.

    ``limit``: bytes of one rank's device; ``context``: tokens a sequence may reach; ``batch``: sequences decoded together on a
    rank; ``prompt``: tokens of the longest prompt, processed at once; ``dtype``: auto (as stored), fp8, or a torch name;
    ``host_limit``: limit of one rank's CPU memory while loading; None: no limit. ``Unplanned`` where the library's code does not
    run without data, or a configuration says what no model can have.
    """
    if world_size < 1 or limit <= 0 or context < 1 or batch < 1:
        raise ValueError(f"{world_size} ranks, {limit} bytes, context {context}, batch {batch}: all must be positive")
    torch_dtype("bfloat16" if dtype == "fp8" else dtype)
    with planning(config):
        stored = skeleton(config, dtype)
        packed = dtype == "fp8" or (dtype == "auto" and in_blocks(config))
        whole = "bfloat16" if dtype == "fp8" else str(_computing(stored)).removeprefix("torch.")
        expanded = skeleton(config, whole) if packed else stored
        run = rehearse(expanded, batch, min(prompt, context), on_gpu)
        step = rehearse_step(expanded, batch, context, on_gpu)
        run = run._replace(activations=max(run.activations, step.activations))
    kept = packed and (dtype == "fp8" or (has_mxfp4_kernels if is_mxfp4(config) else has_fp8_hardware)(on_gpu))
    work = _Work(config, stored, expanded, run, max(step.cache, run.cache), limit, offload, host_limit, kept)
    footprints = tuple(work.footprint(backend, world_size) for backend in BACKENDS)
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
) -> tuple[str, str]:
    """(backend, reason in one line) of the fastest layout that fits the memory of this machine's GPUs, or of the CPU; with
    ``limit``, of a machine where each rank may use so many bytes. ``batch`` rows of ``context`` tokens (default the
    model's, at most 32,768) are decoded together, after prompts of ``prompt`` tokens. Where the memory cannot be planned, the
    first backend that can run the model: nothing says that it does not fit."""
    elsewhere = limit is not None
    limit, where = (limit, "memory") if limit is not None else available_bytes(world_size)
    try:
        plan = plan_memory(
            config,
            world_size,
            limit,
            dtype=dtype,
            context=context or _context(config),
            batch=batch,
            prompt=prompt,
            offload=offload,
            host_limit=None if elsewhere else host_bytes(world_size),
            on_gpu=torch.cuda.is_available() if on_gpu is None else on_gpu,
        )
    except Unplanned as error:
        return _without_plan(config, world_size, offload, str(error))
    best = plan.fastest
    if best is None:
        raise ValueError(f"no backend fits {gib(limit)} GiB a rank ({where}): {plan.advice}")
    reason = f"{best.backend}: the fastest that fits, {gib(best.total)} of {gib(limit)} GiB a rank ({where}), {world_size} ranks"
    return best.backend, reason.replace("1 ranks", "1 rank") if world_size == 1 else reason


def _without_plan(config: Any, world_size: int, offload: str, why: str) -> tuple[str, str]:
    able = [backend for backend in _SMALLEST_FIRST if not refusal(backend, config, world_size)]
    best = "zero3" if offload else "plain" if world_size == 1 else able[0]
    others = ", ".join(backend for backend in able if backend != best)
    return best, f"{best}: {why}; where it does not fit, give --backend {others}"


def available_bytes(world_size: int) -> tuple[int, str]:
    """(bytes that one rank may use on this machine, which memory that is): a GPU's, or its share of the CPU's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * GPU_SHARE), "GPU memory"
    return host_bytes(world_size), "this rank's part of the CPU memory"


def host_bytes(world_size: int) -> int:
    """Bytes of this machine's CPU memory that one of its ranks may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * GPU_SHARE) // local_ranks(world_size)


def gib(number: int) -> str:
    """Bytes as text in GiB."""
    value = number / 2**30
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _context(config: Any) -> int:
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096, 32768)


def _latent_copies(config: Any) -> int:
    """Bytes of the bfloat16 copies of FP8 projections with which latent attention is decoded (``kv_b_proj`` of every layer)."""
    text = config.get_text_config()
    rank = getattr(text, "kv_lora_rank", None) or 0
    if not rank:
        return 0
    rows = text.num_attention_heads * (text.qk_nope_head_dim + text.v_head_dim)
    return int(2 * rank * rows * text.num_hidden_layers)


def _computing(model: Any) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


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

    def footprint(self, backend: str, world_size: int) -> Footprint:
        why_not = refusal(backend, self.config, world_size)
        if not why_not and self.offload and backend != "zero3":
            why_not = "offload is a feature of zero3"
        if why_not:
            return Footprint(backend=backend, why_not=why_not)
        keeps_blocks = self.packed and backend in ("plain", "tp_ep")
        model = self.stored if keeps_blocks else self.expanded
        shard = shard_of(model, backend, world_size, self.offload)
        cache = self.cache // self._cache_parts(world_size) if backend == "tp_ep" else self.cache
        found = Footprint(
            backend=backend,
            weights=0 if self.offload else shard.weights,
            gathered=shard.gathered,
            cache=cache,
            activations=self.run.activations + (_latent_copies(self.config) if keeps_blocks else 0),
            host=shard.host,
            loading=shard.loading,
        )
        if self.host_limit is not None and found.loading > self.host_limit:
            need = f"loading needs {gib(found.loading)} GiB of CPU memory a rank, there are {gib(self.host_limit)}"
            return dataclasses.replace(found, why_not=need)
        return dataclasses.replace(found, fits=found.total <= self.limit)

    def _cache_parts(self, world_size: int) -> int:
        """Number of ranks that share the key-value heads; latent caches and replicated attention are whole on each rank."""
        if world_size == 1:
            return 1
        tp_plan, _ = parallel_rules(self.expanded, world_size)
        cut = any(name.rpartition(".")[2] == "k_proj" and style == "colwise" for name, style in tp_plan.items())
        return world_size if cut else 1

    def advice(self, world_size: int) -> str:
        """What to change when nothing fits, most effective first."""
        found = []
        for number in _RANKS_TO_TRY:
            fitting = [b for b in BACKENDS if number > world_size and self.footprint(b, number).fits]
            if fitting:
                found.append(f"{number} GPUs of this size ({fitting[0]})")
                break
        if self.run.activations + self.cache > self.limit // 4:
            found.append("a smaller --batch or --context")
        if not self.packed and not in_blocks(self.config):  # a checkpoint that is expanded here is already small
            found.append("an FP8 checkpoint with tp_ep")
        if not self.offload:
            found.append("zero3 with --offload cpu")
        return "use " + ", or ".join(found)
