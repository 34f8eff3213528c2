"""DeepSpeed's expert shards: each rank keeps whole experts and sends tokens to their owners.

DeepSpeed replaces the mixture-of-experts block by its own, with its own router. The preset that describes the block follows
from the model's type: DeepSpeed does not notice a wrong one, and the logits are wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_steer.backends import zero3
from moe_steer.backends.blueprint import dequantised
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout
from moe_steer.backends.streaming import own_experts_while_reading

PRESETS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}
"""Model type -> DeepSpeed's preset, for the families whose logits were compared with one unsharded process."""


def load(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Experts sharded, everything else replicated. Each rank reads its own experts only; DeepSpeed then takes over layer by
    layer."""
    config = request.config()
    with own_experts_while_reading():
        model = request.sharded_model(**dequantised(config))
    # No precision is given: DeepSpeed would create an optimizer for it, which refuses experts outside of training.
    settings = zero3.settings(**expert_section(config, layout.world_size))
    started = zero3.start(model, settings)
    return started.module, dataclasses.replace(layout, lockstep=True, engine=started)


def load_zero3(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Experts sharded by expert, the rest by ZeRO-3; for loading see ``zero3.load``."""
    return zero3.load_with(request, layout, expert_section(request.config(), layout.world_size))


def expert_section(config: Any, world_size: int) -> dict[str, Any]:
    """The ``expert_parallel`` section for a model type; KeyError for types that ``refusal`` refuses."""
    return {"expert_parallel": {"enabled": True, "autoep_size": world_size, "preset_model": PRESETS[config.model_type]}}


def refusal(config: Any, world_size: int) -> str:
    """Why DeepSpeed's expert shards cannot hold a model of ``config``; empty when they can."""
    text = config.get_text_config()
    if config.model_type not in PRESETS:
        known = ", ".join(PRESETS)
        return f"DeepSpeed's AutoEP has no preset for {config.model_type} (it has {known}): use tp_ep or zero3"
    num_experts = next(
        n for key in ("n_routed_experts", "num_local_experts", "num_experts") if (n := getattr(text, key, None))
    )
    if num_experts % world_size:
        return f"{num_experts} experts cannot be shared evenly by {world_size} ranks: use a divisor, or zero3"
    return ""
