"""transformers' tensor and expert parallelism in a DeepSpeed inference engine.

Every rank keeps whole experts (number of experts / ranks) and its slice of the dense layers, read straight from the
checkpoint; FP8 blocks stay FP8. All ranks process the same tokens, and the router's ids stay global down to ``experts``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_steer.backends.blueprint import skeleton
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout

_ATTENTION = (".self_attn", ".attn", ".attention")


def load(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Load this rank's shard; all ranks must then be given the same tokens and the same seeds."""
    import deepspeed
    from transformers.distributed import DistributedConfig

    size = layout.world_size
    if size > 1:
        tp_plan, ep_plan = parallel_rules(skeleton(request.config()), size)
        whole = {name: "replicate" for name, style in tp_plan.items() if style == "replicate"}
        options: dict[str, Any] = {"tp_size": size, "ep_size": size if ep_plan else None, "tp_plan": whole or None}
        model = request.sharded_model(distributed_config=DistributedConfig(**options))
    else:
        model = request.model().to(request.device)
    dtype = str(model.dtype).removeprefix("torch.")
    with _left_as_loaded(model):
        engine = deepspeed.init_inference(model, config={"dtype": dtype, "replace_with_kernel_inject": False})
    return engine.module, dataclasses.replace(layout, same_tokens=True, lockstep=True, engine=engine)


@contextmanager
def _left_as_loaded(model: Any) -> Iterator[None]:
    """Inside the block, the model keeps the dtype of every tensor: the engine would cast all of them to one, including FP8
    codes (without their scales), and rotary frequencies and routing biases that the family keeps in float32."""
    casts = ("half", "bfloat16", "float")
    for name in casts:
        setattr(model, name, lambda: model)
    try:
        yield
    finally:
        for name in casts:
            delattr(model, name)


def parallel_rules(model: Any, world_size: int) -> tuple[dict[str, str], dict[str, str]]:
    """(dense rules, expert rules) by wildcard name for a model on so many ranks; ``replicate`` marks layers that stay whole.

    Starts from the family's own plans. A group of layers (an attention, an MLP) whose heads or FP8 blocks the ranks cannot
    share evenly stays whole on every rank: if it were cut, the forward pass would fail or use wrong scales. So does one that the
    library cuts out of larger tensors while it reads.
    """
    ep_plan = dict(model.ep_plan)
    inside = tuple(f"{name}." for name in ep_plan)
    tp_plan = {
        name: style for name, style in model.tp_plan.items() if name not in ep_plan and not name.startswith(inside)
    }
    whole = (
        set()
        if _heads_divide(model, tp_plan, world_size)
        else {g for g in map(_group, tp_plan) if g.endswith(_ATTENTION)}
    )
    whole |= _groups_of_torn_blocks(model, tp_plan, world_size) | _groups_cut_out_while_reading(model, tp_plan)
    return {name: "replicate" if _group(name) in whole else style for name, style in tp_plan.items()}, ep_plan


def _group(name: str) -> str:
    return name.rpartition(".")[0]


def _heads_divide(model: Any, tp_plan: dict[str, str], world_size: int) -> bool:
    if not any(name.rpartition(".")[2] in ("k_proj", "qkv_proj", "query_key_value") for name in tp_plan):
        return True
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return heads % world_size == 0 and (getattr(config, "num_key_value_heads", None) or heads) % world_size == 0


def _groups_of_torn_blocks(model: Any, tp_plan: dict[str, str], world_size: int) -> set[str]:
    """Groups with an FP8 layer whose blocks do not divide among the ranks."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    torn = set()
    for name, grid in shapes.items():
        if not name.endswith(".weight_scale_inv") or len(grid) < 2:
            continue
        layer = name.removesuffix(".weight_scale_inv")
        rule = re.sub(r"\.\d+\.", ".*.", layer)
        style = tp_plan.get(rule, "")
        dimension = -1 if style.startswith("rowwise") else -2
        part = shapes[f"{layer}.weight"][dimension] / grid[dimension] * (grid[dimension] // world_size)
        if style.startswith(("rowwise", "colwise")) and part * world_size != shapes[f"{layer}.weight"][dimension]:
            torn.add(_group(rule))
    return torn


def _groups_cut_out_while_reading(model: Any, tp_plan: dict[str, str]) -> set[str]:
    """Groups whose tensors the library cuts out of one of the checkpoint's, by their full sizes, which a rank's slice does not have."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    targets = [
        target
        for entry in get_model_conversion_mapping(model)
        if any(type(operation).__name__ == "Split" for operation in getattr(entry, "operations", []))
        for target in entry.target_patterns
    ]
    return {_group(name) for name in tp_plan if any(re.search(target, name) for target in targets)}


def refusal(config: Any, world_size: int) -> str:
    """Why this backend cannot hold a model of ``config``; empty when it can."""
    text = config.get_text_config()
    has_expert_plan = bool(getattr(text, "base_model_ep_plan", None))
    if world_size > 1 and not (has_expert_plan or getattr(text, "base_model_tp_plan", None)):
        return f"transformers has no parallel plan for {config.model_type}: use zero3"
    if world_size > 1 and _num_experts(config) and not has_expert_plan:
        return f"transformers has no expert-parallel plan for {config.model_type}: use zero3"
    return uneven_experts(config, world_size)


def uneven_experts(config: Any, world_size: int) -> str:
    """Why so many ranks cannot hold whole experts, the same number each; empty when they can."""
    if _num_experts(config) % world_size:
        return f"{_num_experts(config)} experts cannot be shared evenly by {world_size} ranks: use a divisor, or zero3"
    return ""


def _num_experts(config: Any) -> int:
    text = config.get_text_config()
    keys = ("n_routed_experts", "num_local_experts", "num_experts")
    return next((n for key in keys if (n := getattr(text, key, None))), 0)
