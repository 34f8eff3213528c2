"""The backends by name: which there are, which of them cannot run a model, and the function that loads one.

- plain          the whole model on every rank
- device_map     one process; layers spread over its GPUs, then CPU memory, then disk, by accelerate
- tp_ep          transformers' tensor and expert parallelism inside a DeepSpeed inference engine; keeps FP8 weights
- autoep         DeepSpeed's expert shards; everything except the experts replicated
- autoep_zero3   DeepSpeed's expert shards; the rest sharded by ZeRO-3
- zero3          every parameter sharded by ZeRO-3 and gathered for its layer; exact; can be stored in CPU memory or on NVMe
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from moe_steer.backends.blueprint import BLOCKS, is_gguf, quantisation
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout

Loader = Callable[[LoadRequest, Layout], tuple[Any, Layout]]

_LOADERS = {
    "plain": ("registry", "load_plain"),
    "device_map": ("device_map", "load"),
    "tp_ep": ("tp_ep", "load"),
    "autoep": ("zero3", "load_autoep"),
    "autoep_zero3": ("zero3", "load_autoep_zero3"),
    "zero3": ("zero3", "load"),
}
"""Backend -> (module of this package, function). A module is imported when its backend is used: most need DeepSpeed."""
BACKENDS = tuple(_LOADERS)
"""Fastest first, where each fits in one process; over several ranks, device_map comes last."""
_NEEDS_TRANSFORMERS = (5, 21)


def loader(backend: str) -> Loader:
    """The function that loads a model under ``backend``: (request, layout) -> (model, layout)."""
    load: Loader = getattr(_module(backend), _LOADERS[backend][1])
    return load


def load_plain(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """The whole model in this process; every rank has its own tokens and waits for no other rank."""
    return request.model().to(request.device), layout


def refusal(backend: str, config: Any, world_size: int) -> str:
    """Why ``backend`` cannot run a model of ``config`` on so many ranks, in one sentence; empty when it can."""
    if backend == "plain":
        return ""
    if backend == "device_map":
        return str(_module(backend).refusal(config, world_size))
    if is_gguf(config):
        return "a GGUF file is dequantised by one process: use plain or device_map"
    if (method := quantisation(config)) not in ("", *BLOCKS):
        return f"{method} weights are held whole by the classes of their own package: use plain or device_map"
    if (why := _old_transformers()) or backend == "zero3":  # which can shard any model
        return why
    return str(_module(backend).refusal(config, world_size))


def check_name(backend: str) -> None:
    """ValueError for an unknown backend, and for DeepSpeed's AutoTP, which would not shard the experts."""
    if backend in ("autotp", "tp", "init_inference", "deepspeed"):
        raise ValueError(
            f"backend {backend!r} is refused: DeepSpeed's AutoTP leaves the fused experts of transformers 5 whole on every rank, "
            "so it saves nothing: use tp_ep"
        )
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")


def _old_transformers() -> str:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _NEEDS_TRANSFORMERS:
        return (
            f"transformers {transformers.__version__} rewrites expert ids under expert parallelism, so that a plan would steer "
            "other experts: install transformers >= 5.21"
        )
    return ""


def _module(backend: str) -> ModuleType:
    return import_module(f"moe_steer.backends.{_LOADERS[backend][0]}")
