"""A DynamicCache whose layers grow into spare room, instead of copying the whole past at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


def growing_cache(config: PretrainedConfig, joint: bool = False, most: int | None = None) -> DynamicCache:
    """The cache that ``generate`` would use, its plain layers replaced by ``GrowingLayer``; other kinds of layers stay."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(joint, most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values [B, H, T, D] that are views of larger buffers with room for more rows of T.

    joint: keys and values lie side by side in one buffer [B, H, T, D_key + D_value], so that latent attention can read
    both as one tensor without a copy. most: tokens that there will ever be; no room is kept for more.
    """

    def __init__(self, joint: bool = False, most: int | None = None) -> None:
        super().__init__()
        self._joint = joint
        self._most = most
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states [B, H, new, D] behind the old ones; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < new:
            ahead = new + max(64, new // 4)
            size = ahead if self._most is None else max(new, min(ahead, self._most))
            self._room = self._make_room(key_states, value_states, old, size)
        keys, values = self._room
        keys[:, :, old:new] = key_states
        values[:, :, old:new] = value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    def _make_room(self, key_states: Tensor, value_states: Tensor, old: int, size: int) -> tuple[Tensor, Tensor]:
        rows, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        if self._joint:
            both = key_states.new_empty(rows, heads, size, key_dim + value_dim)
            keys, values = both.split([key_dim, value_dim], dim=-1)
        else:
            keys = key_states.new_empty(rows, heads, size, key_dim)
            values = value_states.new_empty(rows, value_states.shape[1], size, value_dim)
        if old:
            keys[:, :, :old] = self.keys
            values[:, :, :old] = self.values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.keys is None or self.get_seq_length() == 0:
            return
        moves = _moves_into_holes(indices, self.keys.shape[0])
        if moves is None or self._room is None:
            self._room = None
            super().batch_select_indices(indices)
            return
        to, source = moves
        used, num_rows = self.get_seq_length(), len(indices)
        for states in self._room:
            states[to, :, :used] = states[source, :, :used]
        self._room = (self._room[0][:num_rows], self._room[1][:num_rows])
        self.keys, self.values = self._room[0][:, :, :used], self._room[1][:, :, :used]

    # What the library does to keys and values beside `update` makes new tensors: the buffers no longer hold them.
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As DynamicLayer."""
        super().reorder_cache(beam_idx)
        self._room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As DynamicLayer."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer; the room stays, and what follows overwrites the removed tokens."""
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """As DynamicLayer."""
        super().reset()
        self._room = None


def _moves_into_holes(indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor] | None:
    """When ``indices`` only fills holes from behind (row i stays at i, or a row >= len(indices) moves to i): (to, from).

    None for any other choice, and on an accelerator, where one gather costs less than looking at the indices.
    """
    if indices.device.type != "cpu" or len(indices) > num_rows:
        return None
    to = (indices != torch.arange(len(indices))).nonzero()[:, 0]
    source = indices[to]
    return (to, source) if bool((source >= len(indices)).all()) else None
