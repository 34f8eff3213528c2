"""A forward pass without weights or arithmetic: the library's code runs on the meta device while its allocations are counted."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Rehearsed(NamedTuple):
    """Bytes: ``cache`` after the pass; ``activations``: the most that existed at once during the pass, without the cache."""

    cache: int
    activations: int


def rehearse(model: Any, batch: int, tokens: int, on_gpu: bool = True) -> Rehearsed:
    """Prefill ``batch`` rows of ``tokens`` tokens with a model on the meta device, keeping the last logits only.

    Attention counts as its output, as in fused kernels (the CPU has none where keys and values differ in width, as in latent
    attention: there the scores count too); the experts as the library's grouped products.
    """
    from transformers import DynamicCache

    return _pass(model, batch, tokens, DynamicCache(config=model.config), on_gpu)


def rehearse_step(model: Any, batch: int, context: int, on_gpu: bool = True) -> Rehearsed:
    """One token per row after ``context`` - 1 others, with the mask that rows of unequal prompts need: under it the library
    repeats keys and values for all heads that share them.

    For latent attention the prefill decides: the sampler decodes in the latent space, which needs almost no memory.
    """
    from transformers import DynamicCache

    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        return Rehearsed(rehearse(model, batch, context, on_gpu).cache, 0)
    cache = DynamicCache(config=model.config)
    _pass(model, batch, max(context - 1, 1), cache, on_gpu)
    mask_B11T = torch.ones((batch, 1, 1, cache.get_seq_length() + 1), dtype=torch.bool, device="meta")
    return _pass(model, batch, 1, cache, on_gpu, attention_mask=mask_B11T)


def _pass(model: Any, batch: int, tokens: int, cache: Any, on_gpu: bool, **more: Any) -> Rehearsed:
    ids_BS = torch.zeros((batch, tokens), dtype=torch.long, device="meta")
    with torch.no_grad(), _FusedKernels(on_gpu), _Allocations() as allocations:
        model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
        kept = _bytes_of(cache)
    return Rehearsed(kept, max(0, allocations.peak - kept))


def _bytes_of(cache: Any) -> int:
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class _FusedKernels(TorchFunctionMode):
    """Replaces kernels that do not run on the meta device, or are slow there."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2]
            if self._on_gpu or query.shape[-1] == value.shape[-1]:
                return query.new_empty((*query.shape[:-1], value.shape[-1]))
        if func in (getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
            rows, weight = args[:2]
            return rows.new_empty((rows.shape[0], weight.shape[-1]))
        return func(*args, **kwargs)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._total += self._live[key]
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)
