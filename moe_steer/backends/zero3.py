"""ZeRO-3: every parameter is sharded over the ranks and gathered when its layer computes.

Exact (the same arithmetic as one process), and the only way to run a model larger than all GPUs together: shards may be
stored in CPU memory or on NVMe. Every rank has its own tokens, but all must run the same number of forwards.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch

from moe_steer.backends import engine, offload
from moe_steer.backends.blueprint import dequantised, skeleton, stored_dtype, torch_dtype
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout, local_ranks
from moe_steer.backends.streaming import cut_while_reading


def load(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Load the shard of this rank: the checkpoint is read and sharded parameter by parameter."""
    return load_with(request, layout, {})


def load_with(request: LoadRequest, layout: Layout, more: dict[str, Any]) -> tuple[Any, Layout]:
    """Load under ZeRO-3 with additional sections of the DeepSpeed configuration."""
    config = request.config()
    dtype = stored_dtype(config) if request.dtype == "auto" else torch_dtype(request.dtype)
    assert not isinstance(dtype, str)
    rest = _rest(request, config, dtype, layout.world_size)
    settings = engine.settings(dtype, zero_optimization=engine.zero3_section(rest), **more)
    with cut_while_reading(settings):
        model = request.model(**dequantised(config))
    if rest and "nvme_path" in rest:
        weakref.finalize(model, offload.delete, rest["nvme_path"])
    started = engine.start(model, settings)
    _move_buffers(started.module)
    return started.module, dataclasses.replace(layout, lockstep=True, engine=started)


def _move_buffers(model: Any) -> None:
    """Move the buffers to this rank's device: DeepSpeed does not do so for a model whose parameters are already sharded."""
    from deepspeed.accelerator import get_accelerator

    here = get_accelerator().current_device_name()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(here)


def _rest(request: LoadRequest, config: Any, dtype: torch.dtype, world_size: int) -> dict[str, Any] | None:
    """Where shards are stored; None: on the device."""
    if not request.offload:
        return None
    if request.offload == "cpu":
        return offload.in_cpu_memory()
    parts = [-(-parameter.numel() // world_size) for parameter in skeleton(config, "bfloat16").parameters()]
    return offload.on_nvme(request.offload, parts, dtype, local_ranks(world_size))


def refusal(config: Any, world_size: int) -> str:
    """Empty: any transformers model can be sharded."""
    return ""
