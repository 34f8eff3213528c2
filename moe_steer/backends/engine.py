"""The DeepSpeed engine of the backends that DeepSpeed shards itself (zero3, autoep)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moe_steer.backends.layout import lockstep_is_on

GATHER_AHEAD = 0
"""Elements of later layers that ZeRO-3 prefetches. 0: a rank then needs memory for its shard and one layer only."""
KEEP_WHOLE_BELOW = 100_000
"""Parameters of fewer elements stay whole on every rank (norms, biases, routers of small models): gathering them would cost
more."""


def zero3_section(offload_param: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ``zero_optimization`` section: parameters sharded, one layer at a time gathered; ``offload_param``: where shards
    are stored, if not on the device."""
    section: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": KEEP_WHOLE_BELOW,
        "stage3_prefetch_bucket_size": GATHER_AHEAD,
        "stage3_max_reuse_distance": 0,
    }
    return section if offload_param is None else {**section, "offload_param": offload_param}


def settings(dtype: torch.dtype | None = None, **sections: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for inference in ``dtype``; None: the model's own."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype) if dtype else None
    return {"train_micro_batch_size_per_gpu": 1, **({precision: {"enabled": True}} if precision else {}), **sections}


def without_compiled_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator for the CPU when it initialises: that needs a C++ compiler,
    takes half a minute, and sums wrongly over subgroups of ranks (DeepSpeed issue 7625)."""
    import deepspeed

    compatible = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False


def start(model: Any, config: dict[str, Any]) -> Any:
    """Hand the model to DeepSpeed; returns the engine, whose ``module`` is the model, ready for inference."""
    import deepspeed

    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    inner = engine.module
    generate = inner.generate

    @functools.wraps(generate)
    def in_lockstep(*args: Any, **kwargs: Any) -> Any:
        # Without synced_gpus, ranks whose generation ends earlier would leave the others waiting; lockstep() already handles that.
        kwargs.setdefault("synced_gpus", not lockstep_is_on(inner))
        return generate(*args, **kwargs)

    inner.generate = in_lockstep
    return engine
