"""A forward pass without weights or arithmetic: the library's code runs on the meta device while its allocations are counted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_steer.backends.allocations import Allocations, Bounded
from moe_steer.inside import CACHE_NAMES, cache_of
from moe_steer.layers import decoder_layers

_SHORT = 4
"""Tokens with which a cache is made before it is stretched to its full length."""
_CHUNKED = 256
"""Recurrent layers compute a prompt in many small steps without their kernels: longer prompts are drawn on from this one."""
_LIBRARY = "transformers.cache_utils"


class Rehearsed(NamedTuple):
    """Bytes: ``cache`` after the pass; ``activations``: the most that existed at once during the pass, without the cache."""

    cache: int
    activations: int


def rehearse(model: Any, batch: int, tokens: int, on_gpu: bool = True) -> Rehearsed:
    """Prefill ``batch`` rows of ``tokens`` tokens with a model on the meta device, keeping the last logits only.

    Attention counts as its output, as in fused kernels (the CPU has none where keys and values differ in width, as in latent
    attention: there the scores count too); the experts as the library's grouped products.
    """
    if tokens <= 2 * _CHUNKED or not _is_recurrent(model.config):
        return _pass(model, batch, tokens, None, on_gpu)[0]
    one, two = (_pass(model, batch, part * _CHUNKED, None, on_gpu)[0] for part in (1, 2))
    more = tokens / _CHUNKED - 2
    return Rehearsed(*(int(last + more * (last - first)) for first, last in zip(one, two, strict=True)))


def rehearse_step(model: Any, batch: int, context: int, on_gpu: bool = True) -> Rehearsed:
    """One token per row after ``context`` - 1 others, with the mask that rows of unequal prompts need: under it the library
    repeats keys and values for all heads that share them. For latent attention the prefill decides: the sampler decodes in the
    latent space, which needs almost no memory."""
    past = max(context - 1, 1)
    mask_BT = torch.ones((batch, past + 1), dtype=torch.long, device="meta")
    short = past if any(kind.__module__ != _LIBRARY for kind in _kinds(model.config)) else min(_SHORT, past)
    cache = _pass(model, batch, short, None, on_gpu, attention_mask=mask_BT[:, :short])[1]
    if _decodes_in_latents(model) and _stretch(cache, past + 1):
        return Rehearsed(_bytes_of([cache, *cache.layers]), 0)
    if short < past and not _stretch(cache, past):
        cache = _pass(model, batch, past, None, on_gpu, attention_mask=mask_BT[:, :past])[1]
    return _pass(model, batch, 1, cache, on_gpu, attention_mask=mask_BT)[0]


def _is_recurrent(config: Any) -> bool:
    """Whether some layers keep a state (linear attention, state space) in place of keys and values."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in _kinds(config))


def _kinds(config: Any) -> set[type]:
    """The classes that keep the past of the layers."""
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

    named = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return {DYNAMIC_LAYER_TYPE_MAPPING.get(name, DynamicLayer) for name in named}


def _decodes_in_latents(model: Any) -> bool:
    """Whether attention is latent and reads all keys: an indexer chooses among expanded ones."""
    latent = [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]
    return bool(latent) and not any(hasattr(module, "indexer") for module in latent)


def _stretch(cache: Any, tokens: int) -> bool:
    """Give every layer of a short cache the size that it has after ``tokens`` tokens, by its kind; False where a layer is of the
    family's own kind, whose growth only the family's code knows."""
    if any(type(layer).__module__ != _LIBRARY for layer in cache.layers):
        return False
    for layer in cache.layers:
        if not isinstance(getattr(layer, "keys", None), Tensor) or layer.keys.ndim != 4:
            continue  # a state, which does not grow
        kept = tokens
        if layer.is_sliding:
            kept, layer.cumulative_length = min(tokens, layer.sliding_window - 1), tokens
        for name, dimension in (("keys", 2), ("values", 2), ("indexer_keys", 1), ("indexer_position_ids", 2)):
            short = getattr(layer, name, None)
            if isinstance(short, Tensor) and short.ndim > dimension:
                setattr(layer, name, short.new_empty((*short.shape[:dimension], kept, *short.shape[dimension + 1 :])))
    return True


def _pass(model: Any, batch: int, tokens: int, cache: Any, on_gpu: bool, **more: Any) -> tuple[Rehearsed, Any]:
    """What a forward takes, and the cache after it: the given one, or the one that the model makes for itself."""
    ids_BS = torch.zeros((batch, tokens), dtype=torch.long, device="meta")
    takes = inspect.signature(model.forward).parameters
    if "logits_to_keep" in takes:
        more["logits_to_keep"] = 1
    more[next((name for name in CACHE_NAMES if name in takes), CACHE_NAMES[1])] = cache
    if "attention_mask" in more:
        first = more["attention_mask"].shape[1] - tokens
        more["position_ids"] = torch.arange(first, first + tokens, device="meta").expand(batch, tokens)
    for every_layer in (False, True):
        with torch.no_grad(), _WithoutData(on_gpu), Allocations() as allocations:
            with _stand_ins(model, allocations, every_layer) as skipped:
                try:
                    output = model(input_ids=ids_BS, use_cache=True, **more)
                    break
                except _NoStandIns:
                    continue
    cache = cache_of({}, output)
    kept = _bytes_of([cache, *cache.layers]) + sum(stand_in.bytes for stand_in in skipped)
    return Rehearsed(kept, max(0, allocations.peak - kept)), cache


class _Watched(torch.nn.Module):
    """The first layer of a kind: it remembers what it hands on beside its states. All else is its layer's."""

    def __init__(self, index: int, layer: torch.nn.Module, num_layers: int) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no submodule: what the library asks of a layer, it asks of this one
        self.index, self._num_layers = index, num_layers
        self.rest: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(getattr(cache_of(kwargs), "layers", ())) != self._num_layers:
            raise _NoStandIns
        output = self.layer(*args, **kwargs)
        self.rest = output[1:] if isinstance(output, tuple) else None
        return output


class _StandIn(_Watched):
    """A later one: it allocates as much cache as the first, and hands its input on."""

    def __init__(self, index: int, layer: torch.nn.Module, like: _Watched, allocations: Allocations) -> None:
        super().__init__(index, layer, 0)
        self._like, self._allocations, self.bytes = [like], allocations, 0  # in a list: no submodule

    def forward(self, hidden_BSD: Any, *args: Any, **kwargs: Any) -> Any:
        layers, like = cache_of(kwargs).layers, self._like[0]
        layers[self.index] = copy(layers[like.index])
        self.bytes = _bytes_of([layers[like.index]])
        self._allocations.add(self.bytes)
        return hidden_BSD if like.rest is None else (hidden_BSD, *like.rest)


class _NoStandIns(Exception): ...  # the family passes its cache in another way


@contextmanager
def _stand_ins(model: Any, allocations: Allocations, every_layer: bool) -> Iterator[list[_StandIn]]:
    """Run only the first and the last decoder layer of each kind: in the last of some kind the most memory is taken."""
    layers = torch.nn.ModuleList()
    if not every_layer and _grows_by_layers(model):
        with suppress(ValueError):
            layers = decoder_layers(model)[1]
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or [""] * len(layers)
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault((_alike(layer), *types[index : index + 1]), []).append(index)
    whole, made = list(layers), list[_StandIn]()
    try:
        for places in (found for found in kinds.values() if len(found) > 2):
            first = _Watched(places[0], whole[places[0]], len(whole))
            layers[places[0]] = first
            for index in places[1:-1]:
                made.append(_StandIn(index, whole[index], first, allocations))
                layers[index] = made[-1]
        yield made
    finally:
        for index, layer in enumerate(whole):
            layers[index] = layer


def _grows_by_layers(model: Any) -> bool:
    """Whether each layer keeps keys and values of its own, in the library's way: no states, no choice among expanded keys."""
    if any(kind.__module__ != _LIBRARY for kind in _kinds(model.config)) or _is_recurrent(model.config):
        return False
    return not any(hasattr(module, "indexer") or hasattr(module, "conv1d") for module in model.modules())


def _alike(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What a layer is made of: classes, sizes and settings of its parts, but not its own number."""
    parts = []
    for name, module in layer.named_modules():
        plain = [item for item in vars(module).items() if isinstance(item[1], int | float | str | bool | None)]
        plain = sorted(item for item in plain if "idx" not in item[0] and "index" not in item[0])
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        parts.append(repr((name, type(module), plain, [(key, tensor.shape, tensor.dtype) for key, tensor in own])))
    return tuple(parts)


def _bytes_of(owners: Sequence[Any]) -> int:
    storages = {}
    for owner in owners:
        for tensor in tree_leaves(list(vars(owner).values())):
            if isinstance(tensor, Tensor) and tensor.ndim:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class _WithoutData(Bounded):
    """Replaces kernels that do not run on the meta device, or are slow there, and answers what only data can tell.

    Questions are answered by no (rows are padded, a mask is needed), numbers are 0; of the experts that were hit one is found,
    with all tokens: the most that a loop over the experts holds at once.
    """

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
        answer = _guess(func, args, kwargs) if args and isinstance(args[0], Tensor) and args[0].is_meta else _UNKNOWN
        return super().__torch_function__(func, types, args, kwargs) if answer is _UNKNOWN else answer


_UNKNOWN = object()


def _guess(func: Any, args: Any, kwargs: Any) -> Any:
    """The answer to a question that only data can answer; ``_UNKNOWN`` for any other call."""
    first = args[0]
    if func is Tensor.__bool__:
        return False
    if func in (Tensor.item, Tensor.__int__, Tensor.__index__):
        return 0
    if func in (torch.nonzero, Tensor.nonzero):
        found = first.new_empty((1, first.ndim), dtype=torch.long)
        return tuple(found.unbind(1)) if kwargs.get("as_tuple") else found
    if func in (torch.where, Tensor.where) and len(args) == 1 and not kwargs:
        return tuple(first.new_empty(first.shape[-1:], dtype=torch.long) for _ in range(first.ndim))
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return _UNKNOWN
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(part, Tensor) and (part.ndim == 0 or part.dtype == torch.bool) for part in parts):
        return _UNKNOWN
    return first[sum((_index(part) for part in parts), ())] if func is Tensor.__getitem__ else None


def _index(part: Any) -> tuple[Any, ...]:
    """A part of an index without data: the first of a dimension for an unknown number, all of it for an unknown choice."""
    if not isinstance(part, Tensor) or (part.ndim and part.dtype != torch.bool):
        return (part,)
    return (slice(None),) * part.ndim if part.dtype == torch.bool else (0,)
