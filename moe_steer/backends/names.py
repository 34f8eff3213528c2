"""Which backends there are, and which of them cannot run a model, by name."""

from __future__ import annotations

from typing import Any

from moe_steer.backends import BACKENDS

_NEEDS_TRANSFORMERS = (5, 21)


def refusal(backend: str, config: Any, world_size: int) -> str:
    """Why ``backend`` cannot run a model of ``config`` on so many ranks, in one sentence; empty when it can."""
    from moe_steer.backends import autoep, tp_ep

    if backend == "plain":
        return ""
    if old := _old_transformers():
        return old
    if backend == "tp_ep":
        return tp_ep.refusal(config, world_size)
    if backend in ("autoep", "autoep_zero3"):
        return autoep.refusal(config, world_size)
    return ""


def check_name(backend: str) -> None:
    """ValueError for a backend that does not exist, or is known to mislead."""
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
