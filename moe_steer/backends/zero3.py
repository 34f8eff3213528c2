"""ZeRO-3: every parameter is sharded over the ranks and gathered when its layer computes.

Exact (the same arithmetic as one process), and the only way to run a model larger than all GPUs together: shards may be
stored in CPU memory or on NVMe. Every rank has its own tokens, but all must run the same number of forwards.

And DeepSpeed's expert shards (``autoep``): each rank keeps whole experts and sends tokens to their owners. DeepSpeed replaces the
mixture-of-experts block by its own, with its own router. The preset that describes the block follows from the model's type:
DeepSpeed does not notice a wrong one, and the logits are wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_steer.backends import offload
from moe_steer.backends.blueprint import dequantised, skeleton, stored_dtype, torch_dtype
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout, local_ranks, lockstep_is_on
from moe_steer.backends.streaming import cut_while_reading, own_experts_while_reading
from moe_steer.backends.tp_ep import uneven_experts

GATHER_AHEAD = 0
"""Elements of later layers that ZeRO-3 prefetches. 0: a rank then needs memory for its shard and one layer only."""
KEEP_WHOLE_BELOW = 100_000
"""Parameters of fewer elements stay whole on every rank (norms, biases, routers of small models): gathering them would cost
more."""
PRESETS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}
"""Model type -> DeepSpeed's preset, for the families whose logits were compared with one unsharded process."""


def load(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Load the shard of this rank: the checkpoint is read and sharded parameter by parameter."""
    return load_with(request, layout, {})


def load_with(request: LoadRequest, layout: Layout, more: dict[str, Any]) -> tuple[Any, Layout]:
    """Load under ZeRO-3 with additional sections of the DeepSpeed configuration."""
    config = request.config()
    dtype = stored_dtype(config) if request.dtype == "auto" else torch_dtype(request.dtype)
    assert not isinstance(dtype, str)
    rest = _rest(request, config, dtype, layout.world_size)
    config_of_engine = settings(dtype, zero_optimization=zero3_section(rest), **more)
    with cut_while_reading(config_of_engine):
        model = request.sharded_model(**dequantised(config))
    if rest and "nvme_path" in rest:
        weakref.finalize(model, offload.delete, rest["nvme_path"])
    started = start(model, config_of_engine)
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

    with _recorders_by_name():
        engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    inner = engine.module
    for block in inner.modules():
        if getattr(block, "_is_autoep_layer", False):
            _in_its_own_precision(block.router.gate)
    generate = inner.generate

    @functools.wraps(generate)
    def in_lockstep(*args: Any, **kwargs: Any) -> Any:
        # Without synced_gpus, ranks whose generation ends earlier would leave the others waiting; lockstep() already handles that.
        kwargs.setdefault("synced_gpus", not lockstep_is_on(inner))
        return generate(*args, **kwargs)

    inner.generate = in_lockstep
    return engine


def _in_its_own_precision(gate: Any) -> None:
    """transformers 5.24 keeps the weights of routers in float32, and DeepSpeed gives them the tokens as they are."""
    forward = gate.forward
    gate.forward = lambda hidden: forward(hidden.to(gate.weight.dtype))


@contextmanager
def _recorders_by_name() -> Iterator[None]:
    """Inside the block the library's table of what models can record is asked by the name of a class too, and with a default: so
    DeepSpeed 0.19 asks it, for AutoEP, and since 5.23 transformers takes a model alone."""
    from transformers.utils import output_capturing

    class ByName(dict[str, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return super().get(key if isinstance(key, str) else str(type(key)), {} if default is None else default)

    own = output_capturing._CAN_RECORD_REGISTRY
    output_capturing._CAN_RECORD_REGISTRY = ByName(own)  # DeepSpeed takes its own entries out again
    try:
        yield
    finally:
        output_capturing._CAN_RECORD_REGISTRY = own


def load_autoep(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Experts sharded, everything else replicated. Each rank reads its own experts only; DeepSpeed then takes over layer by
    layer."""
    config = request.config()
    with own_experts_while_reading():
        model = request.sharded_model(**dequantised(config))
    # No precision is given: DeepSpeed would create an optimizer for it, which refuses experts outside of training.
    section = settings(**expert_section(config, layout.world_size))
    started = start(model, section)
    return started.module, dataclasses.replace(layout, lockstep=True, engine=started)


def load_autoep_zero3(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Experts sharded by expert, the rest by ZeRO-3; for loading see ``load``."""
    return load_with(request, layout, expert_section(request.config(), layout.world_size))


def expert_section(config: Any, world_size: int) -> dict[str, Any]:
    """The ``expert_parallel`` section for a model type; KeyError for types that ``refusal`` refuses."""
    return {"expert_parallel": {"enabled": True, "autoep_size": world_size, "preset_model": PRESETS[config.model_type]}}


def refusal(config: Any, world_size: int) -> str:
    """Why DeepSpeed's expert shards cannot hold a model of ``config``; empty when they can."""
    if config.model_type not in PRESETS:
        known = ", ".join(PRESETS)
        return f"DeepSpeed's AutoEP has no preset for {config.model_type} (it has {known}): use tp_ep or zero3"
    return uneven_experts(config, world_size)
