"""Rows and columns of a key-value cache of any kind: rows selected and joined, columns of padding dropped.

Rows can be selected in every cache. The library's own methods do it where they are complete; a layer class that keeps more
state than the class that it takes the method from (convolution states, compressed keys, the keys of the prompt) would keep the
other rows of that state, so whatever tensors the method left alone are selected here.

Joining needs to know what each tensor means, so it is done for the library's own kinds alone (``can_join``). A kind of a model's
own may count columns, padding included, as compressed and block-sparse attention do: its rows must have no padding at all.

Code that keeps state of its own for each row on the cache follows by three methods of the cache: ``keep_rows(indices)``,
``add_rows(others)`` and ``name_rows(samples)``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from reasoning_evals.engines.kv_cache import GrowingLayer

_JOINED = frozenset(
    {
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        GrowingLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
        getattr(
            cache_utils, "DummyLayer", DynamicLayer
        ),  # before transformers 5.24 a layer that keeps nothing is not told apart
    }
)
"""Exact classes: a subclass may keep more than these do."""


def can_join(cache: Any) -> bool:
    """Whether rows of unequal lengths can share this cache, and others can be joined to it; asked before its first use."""
    return type(cache) is DynamicCache and all(type(layer) in _JOINED for layer in cache.layers)


def keeps_states_alone(cache: Any) -> bool:
    """Whether no layer keeps keys and values, as in Mamba."""
    return all(type(layer) is LinearAttentionLayer for layer in cache.layers)


def reads_padding(model: Any, cache: Any) -> bool:
    """Whether a column of padding may change what a layer remembers: a layer that reads its input in order, of a model whose
    code does not ask the library for the mask that such layers need."""
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return False
    sources = {type(module).__module__ for module in model.modules()}
    return not any(hasattr(sys.modules.get(name), "create_recurrent_attention_mask") for name in sources)


def select_rows(cache: Any, indices: Tensor, num_rows: int) -> None:
    """Keep these rows of the ``num_rows``, in this order; a row may be repeated."""
    for layer in cache.layers:
        _select(layer, _row_method(layer), indices, num_rows)
    _select(cache, None, indices, num_rows)
    if hasattr(cache, "keep_rows"):
        cache.keep_rows(indices)


def fork_rows(cache: Any, indices: Tensor, num_rows: int) -> Any:
    """Another cache of these rows of the ``num_rows``: what is written into it is not written into the first."""
    tensors = {id(tensor): tensor for owner in (cache, *cache.layers) for _, _, tensor in _tensors(vars(owner))}
    forked = copy.deepcopy(cache, dict(tensors))  # the tensors are shared until their rows are selected
    for layer in forked.layers:
        if isinstance(layer, GrowingLayer):
            layer.leave_room()
    select_rows(forked, indices, num_rows)
    name_rows(forked, None)
    return forked


def name_rows(cache: Any, samples: Sequence[Any] | None) -> None:
    """Say of which sample each row is, to whom counts by row; None: they are copies to try something on."""
    if hasattr(cache, "name_rows"):
        cache.name_rows(samples)


def join_rows(cache: Any, others: Sequence[Any], width: int, most: int) -> None:
    """Append the rows of other caches. All get ``width`` columns, those of the shorter ones in front, for the mask to hide.

    most: columns that the cache will ever have.
    """
    for layer, *more in zip(cache.layers, *(other.layers for other in others), strict=True):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            _join_states(layer, more)
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            _join_columns(layer, more, width, most)
    if hasattr(cache, "add_rows"):
        cache.add_rows(others)


def drop_columns(cache: Any, number: int) -> None:
    """Remove the first columns, which are padding in every row. Only for a cache that ``can_join``."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.drop_columns(number)
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            stored = layer.keys.shape[-2]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= number
                number_here = max(stored - layer.cumulative_length, 0)
            else:
                number_here = number
            layer.keys, layer.values = layer.keys[:, :, number_here:], layer.values[:, :, number_here:]
            if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
                layer.indexer_keys = layer.indexer_keys[:, number:]
                if layer.indexer_position_ids is not None:
                    layer.indexer_position_ids = layer.indexer_position_ids[..., number:]


def drop_newest(cache: Any, length: int) -> bool:
    """Take out what lies beyond the first ``length`` columns; False, with nothing done, for layers that cannot go back."""
    if type(cache) is not DynamicCache or any(
        type(layer) not in (GrowingLayer, DynamicLayer) for layer in cache.layers
    ):
        return False
    for layer in cache.layers:
        layer.crop(min(0, length - layer.get_seq_length()))
    return True


def _row_method(layer: Any) -> Any:
    """The library's method that selects rows, of the most derived class that has one; None where there is none."""
    for kind in type(layer).__mro__:
        for name in ("batch_select_indices", "reorder_cache"):
            if name in vars(kind):
                return getattr(layer, name)
    return None


def _select(owner: Any, method: Any, indices: Tensor, num_rows: int) -> None:
    before = [tensor for _, _, tensor in _tensors(vars(owner))]
    if method is not None:
        method(indices)
    left_alone = {id(tensor) for tensor in before}
    for holder, key, tensor in list(_tensors(vars(owner))):
        if id(tensor) in left_alone and tensor.ndim and len(tensor) == num_rows:
            holder[key] = tensor.index_select(0, indices.to(tensor.device))


def _tensors(holder: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """(dict or list, key, tensor) for every tensor in nested dicts and lists."""
    pairs: Iterable[tuple[Any, Any]] = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in pairs:
        if isinstance(value, Tensor):
            yield holder, key, value
        elif isinstance(value, dict | list):
            yield from _tensors(value)


def _join_states(layer: Any, more: Sequence[Any]) -> None:
    for states in ("conv_states", "recurrent_states"):
        ours = getattr(layer, states)
        for number, state in ours.items():
            if state is not None:
                ours[number] = torch.cat([state, *(getattr(other, states)[number] for other in more)])


def _join_columns(layer: Any, more: Sequence[Any], width: int, most: int) -> None:
    if isinstance(layer, GrowingLayer):
        layer.join(more, width, most)
        return
    stored = width
    if isinstance(layer, DynamicSlidingWindowLayer):
        stored = min(width, layer.sliding_window - 1)
        layer.cumulative_length = width
    parts = [layer, *more]
    layer.keys = torch.cat([_widened(part.keys, stored, -2) for part in parts])
    layer.values = torch.cat([_widened(part.values, stored, -2) for part in parts])
    if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
        layer.indexer_keys = torch.cat([_widened(part.indexer_keys, width, 1) for part in parts])
        if layer.indexer_position_ids is not None:
            ids = [_widened(part.indexer_position_ids, width, -1) for part in parts]
            layer.indexer_position_ids = torch.cat(ids, dim=1)


def _widened(tensor: Tensor, size: int, axis: int) -> Tensor:
    """With zeros in front, up to this size along the axis."""
    behind = tensor.ndim - 1 - axis % tensor.ndim
    return nn.functional.pad(tensor, (0, 0) * behind + (size - tensor.shape[axis], 0))
