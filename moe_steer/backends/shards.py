"""How many bytes of a model one rank holds under each backend: pure arithmetic on the shapes of its parameters."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from torch import nn

from moe_steer.backends.offload import BUFFERS, SMALLEST
from moe_steer.backends.tp_ep import parallel_rules
from moe_steer.backends.zero3 import KEEP_WHOLE_BELOW

_COPIES = 3
"""Copies of a parameter that exist while it is read: the checkpoint's tensors, those stacked, those joined."""


class Shard(NamedTuple):
    """Bytes of the fullest rank: ``weights`` at rest on its device, ``gathered``: the largest layer that is gathered there
    to compute, ``host``: CPU memory at rest (offloaded shards), ``loading``: CPU memory at the peak of loading."""

    weights: int
    gathered: int = 0
    host: int = 0
    loading: int = 0


def shard_of(model: nn.Module, backend: str, world_size: int, offload: str = "") -> Shard:
    """The shard of one rank for a model on the meta device."""
    whole = _bytes(model)
    if backend == "plain":
        return Shard(whole, loading=whole)
    if backend == "tp_ep":
        weights = _tp_ep(model, world_size)
        return Shard(weights, loading=weights + _largest(model))
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    if backend == "autoep":
        rest = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in experts)
        held = sum(
            p.numel() * p.element_size() // world_size for name, p in model.named_parameters() if name in experts
        )
        weights = rest + held + _buffers(model)
        return Shard(
            weights,
            loading=weights + _COPIES * max(_largest(model) // world_size, _read_at_once(model, world_size, experts)),
        )
    cut_by_expert = experts if backend == "autoep_zero3" else set()
    weights = _buffers(model)
    for name, parameter in model.named_parameters():
        parts = world_size
        if name not in cut_by_expert and parameter.numel() <= KEEP_WHOLE_BELOW:
            parts = 1
        weights += math.ceil(parameter.numel() / parts) * parameter.element_size()
    gathered = max(_own(module, name, cut_by_expert) for name, module in model.named_modules())
    loading = weights + _COPIES * _read_at_once(model, world_size, experts)
    if cut_by_expert:  # DeepSpeed gathers a layer's experts before it distributes them
        loading = max(loading, weights + (_COPIES + 1) * _largest(model))
    if offload == "cpu":
        return Shard(gathered, gathered, host=weights, loading=loading)
    if offload:
        host = _beside_nvme(model, world_size)
        return Shard(gathered, gathered, host=host, loading=host + loading - weights)
    return Shard(weights, gathered, loading=loading)


def latent_copies(config: Any) -> int:
    """Bytes of the bfloat16 copies of FP8 projections with which latent attention is decoded (``kv_b_proj`` of every layer)."""
    text = config.get_text_config()
    rank = getattr(text, "kv_lora_rank", None) or 0
    if not rank:
        return 0
    rows = text.num_attention_heads * (text.qk_nope_head_dim + text.v_head_dim)
    return int(2 * rank * rows * text.num_hidden_layers)


def cache_parts(model: Any, world_size: int) -> int:
    """Number of ranks under tp_ep that share the key-value heads; latent caches and replicated attention are whole on each."""
    if world_size == 1:
        return 1
    tp_plan, _ = parallel_rules(model, world_size)
    cut = any(name.rpartition(".")[2] == "k_proj" and style == "colwise" for name, style in tp_plan.items())
    return world_size if cut else 1


def _beside_nvme(model: nn.Module, world_size: int) -> int:
    """Bytes of a rank's shard that stay in memory when the rest is on NVMe, plus the transfer buffers."""
    parts = [-(-parameter.numel() // world_size) * parameter.element_size() for parameter in model.parameters()]
    return _buffers(model) + sum(part for part in parts if part < SMALLEST) + BUFFERS * max(parts)


def _read_at_once(model: Any, world_size: int, experts: set[str]) -> int:
    """Bytes of the largest parameter, or of a rank's experts in it if the checkpoint has one tensor per expert
    (``moe_steer.backends.streaming``)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    operations = [op for entry in get_model_conversion_mapping(model) for op in getattr(entry, "operations", [])]
    by_expert = any(type(op).__name__ == "MergeModulelist" for op in operations)

    def parts(name: str, parameter: nn.Parameter) -> int:
        return world_size if by_expert and name in experts and parameter.shape[0] % world_size == 0 else 1

    return max(p.numel() * p.element_size() // parts(name, p) for name, p in model.named_parameters())


def _largest(model: nn.Module) -> int:
    """Bytes of the largest layer, which is read whole before it is sharded."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in model.modules()
    )


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters()) + _buffers(model)


def _buffers(model: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for b in model.buffers())


def _own(module: nn.Module, prefix: str, left_out: set[str]) -> int:
    """Bytes that gathering a module takes: several parameters come in one buffer and are then copied out of it."""
    gathered = [
        parameter.numel() * parameter.element_size()
        for name, parameter in module.named_parameters(recurse=False)
        if f"{prefix}.{name}" not in left_out and parameter.numel() > KEEP_WHOLE_BELOW
    ]
    return sum(gathered) * (2 if len(gathered) > 1 else 1)


def _tp_ep(model: Any, world_size: int) -> int:
    if world_size == 1:
        return _bytes(model)
    tp_plan, ep_plan = parallel_rules(model, world_size)
    total = _buffers(model)
    for name, parameter in model.named_parameters():
        dimension = _cut_dimension(re.sub(r"\.\d+\.", ".*.", name), parameter.ndim, tp_plan, ep_plan)
        elements = parameter.numel()
        if dimension is not None:
            length = parameter.shape[dimension]
            elements = elements // length * math.ceil(length / world_size)
        total += elements * parameter.element_size()
    return total


def _cut_dimension(name: str, ndim: int, tp_plan: dict[str, str], ep_plan: dict[str, str]) -> int | None:
    """The dimension along which the ranks share a parameter; None if it is replicated."""
    base = name.removesuffix("_scale_inv")
    if ep_plan.get(name) == "grouped_gemm" or ep_plan.get(base) == "grouped_gemm":
        return 0
    layer, _, kind = name.rpartition(".")
    style = tp_plan.get(name) or tp_plan.get(layer, "")
    if style.startswith("embedding_"):
        return 0 if style == "embedding_rowwise" else 1
    if style.startswith(("colwise", "packed_colwise")):
        return -2 if ndim > 1 else -1
    if style.startswith("rowwise") and kind != "bias":
        return -1
    return None
