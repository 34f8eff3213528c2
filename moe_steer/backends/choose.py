"""Which backend: refusals by name, and the fastest that fits."""

from __future__ import annotations

from typing import Any

import torch


def choose(
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
    """(backend, reason in one line) of the fastest layout that fits the memory of this machine's GPUs, or of the CPU;
    with ``limit``, of a machine of which each rank may fill so many bytes. ``batch`` rows of ``context`` tokens (default the
    model's, at most 32,768) are decoded together, behind prompts of ``prompt``."""
    from moe_steer.backends.memory import available_bytes, gib, host_bytes, plan_memory

    elsewhere = limit is not None
    limit, where = (limit, "memory") if limit is not None else available_bytes(world_size)
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
    best = plan.fastest
    if best is None:
        raise ValueError(f"no backend fits {gib(limit)} GiB a rank ({where}): {plan.advice}")
    reason = f"{best.backend}: the fastest that fits, {gib(best.total)} of {gib(limit)} GiB a rank ({where}), {world_size} ranks"
    return best.backend, reason.replace("1 ranks", "1 rank") if world_size == 1 else reason


def _context(config: Any) -> int:
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096, 32768)
