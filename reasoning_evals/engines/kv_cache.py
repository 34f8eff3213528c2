"""A faster key-value cache: buffers that grow in place, and decoding of latent attention without expanding the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "absorbed_latent_attention"
_EXPANDED = "_absorbed_kv_b_weight"


def growing_cache(config: PretrainedConfig, joint: bool = False, most: int | None = None) -> DynamicCache:
    """The cache that ``generate`` would use, with its plain layers replaced by ``GrowingLayer``; other kinds of layers stay."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(joint, most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values [B, H, T, D] that are views of larger buffers with room for more rows of T.

    joint: keys and values lie side by side in one buffer [B, H, T, D_key + D_value], so that latent attention can read
    both as one tensor without a copy. most: maximum number of tokens; no room is reserved beyond it.
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
        indices = indices.to(self.keys.device)  # layers may be spread over several GPUs
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

    def join(self, others: Sequence[GrowingLayer], width: int, most: int) -> None:
        """Append the rows of other layers; all get ``width`` columns, zeros in front. most: as for the class, from now on."""
        parts = [self, *others]
        self._most = most
        rows = sum(part.keys.shape[0] for part in parts)
        size = max(width, min(width + max(64, width // 4), most))
        room = self._make_room(
            self.keys[:1].expand(rows, -1, -1, -1), self.values[:1].expand(rows, -1, -1, -1), 0, size
        )
        for states, name in zip(room, ("keys", "values"), strict=True):
            start = 0
            for part in parts:
                theirs = getattr(part, name)
                mine = states[start : start + len(theirs)]
                padding = width - theirs.shape[-2]
                mine[:, :, :padding] = 0
                mine[:, :, padding:width] = theirs
                start += len(theirs)
        self._room = room
        self.keys, self.values = room[0][:, :, :width], room[1][:, :, :width]

    def drop_columns(self, number: int) -> None:
        """Remove the first columns; their room is given back when the buffers grow next."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, number:], self.values[:, :, number:]
            if self._room is not None:
                self._room = (self._room[0][:, :, number:], self._room[1][:, :, number:])

    def leave_room(self) -> None:
        """Write to the buffers no more: the next rows and tokens go into buffers of this layer's own."""
        self._room, self._most = None, None

    # Every other operation of the library on keys and values makes new tensors, which are not in the buffers.
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As DynamicLayer."""
        super().reorder_cache(beam_idx)
        self._room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As DynamicLayer."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer; the buffer stays, and later tokens overwrite the removed ones."""
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """As DynamicLayer."""
        super().reset()
        self._room = None


def _moves_into_holes(indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor] | None:
    """(to, from) if ``indices`` only fills gaps from the end (row i stays at i, or a row >= len(indices) moves to i).

    None for any other selection, and on an accelerator, where one gather costs less than reading the indices back.
    """
    if indices.device.type != "cpu" or len(indices) > num_rows:
        return None
    to = (indices != torch.arange(len(indices))).nonzero()[:, 0]
    source = indices[to]
    return (to, source) if bool((source >= len(indices)).all()) else None


class AbsorbedLatents:
    """``with AbsorbedLatents(model): model(one token a row)``: reusable; the model is as before outside the block.

    For decode steps only: one query token a row, all others in the cache. ``layers`` is empty, and the block changes nothing,
    for a model without such attention, or with an attention implementation other than sdpa and eager.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers: list[Any] = [module for module in model.modules() if _is_latent_attention(module)]
        configs = list({id(layer.config): layer.config for layer in layers}.values())
        usual = all(config._attn_implementation in ("sdpa", "eager") for config in configs)
        self.layers = layers if usual else []
        self._configs = configs if usual else []
        self._implementations = [config._attn_implementation for config in self._configs]

    def __enter__(self) -> None:
        for config in self._configs:
            config._attn_implementation = _NAME
        for layer in self.layers:
            layer.__dict__["expand_kv"] = _leave_compressed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            layer.__dict__.pop("expand_kv", None)
        for config, implementation in zip(self._configs, self._implementations, strict=True):
            config._attn_implementation = implementation


def _is_latent_attention(module: Any) -> bool:
    projection: Any = getattr(module, "kv_b_proj", None)
    if not hasattr(module, "expand_kv") or getattr(projection, "bias", None) is not None:
        return False
    if type(projection) is not nn.Linear and not _is_block_fp8(projection):
        return False
    if type(projection.weight) is not nn.Parameter:  # torchao puts its own kind of tensor into plain linear layers
        return False
    if not all(hasattr(module, name) for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "config")):
        return False
    # A weight that DeepSpeed's ZeRO-3 gathers for the call of its layer must not be read without that call: a rank that skips a
    # layer breaks the common order of layers, and the other ranks hang.
    if hasattr(projection.weight, "ds_id"):
        return False
    # A sharded weight, or one quantised to fewer bits, has another shape: such a layer runs the library's code.
    rows, rank = projection.weight.shape if projection.weight.ndim == 2 else (0, 0)
    heads, left = divmod(rows, module.qk_nope_head_dim + module.v_head_dim)
    # Indexed (sparse) attention chooses keys by position and reads the expanded ones.
    return heads > 0 and left == 0 and rank == module.kv_lora_rank and not hasattr(module, "indexer")


def _is_block_fp8(projection: Any) -> bool:
    weight, scales = (getattr(projection, name, None) for name in ("weight", "weight_scale_inv"))
    if not isinstance(weight, Tensor) or not isinstance(scales, Tensor) or not getattr(projection, "block_size", None):
        return False
    return weight.element_size() == 1 and weight.is_floating_point() and weight.ndim == scales.ndim == 2


def _expanded(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of ``kv_b_proj``. An FP8 weight is expanded to ``dtype`` once and kept: doing so at every step would cost
    more than the attention. For DeepSeek-R1 the copies take 2 GiB in total."""
    projection = module.kv_b_proj
    if not _is_block_fp8(projection):
        return projection.weight
    kept = module.__dict__.get(_EXPANDED)
    if kept is None or kept.dtype != dtype:
        rows, columns = projection.weight.shape
        block_rows, block_columns = projection.block_size
        scales = (
            projection.weight_scale_inv.float().repeat_interleave(block_rows, 0).repeat_interleave(block_columns, 1)
        )
        kept = (projection.weight.float() * scales[:rows, :columns]).to(dtype)
        module.__dict__[_EXPANDED] = (
            kept  # a plain attribute and not a buffer: it must not be saved or moved with the model
        )
    return kept


def _in_memory(projection: Any) -> AbstractContextManager[None]:
    """Inside the block the weight can be read, also where accelerate keeps it elsewhere between calls."""
    if not hasattr(projection, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(projection)


def _leave_compressed(latent_B1TR: Tensor, rotary_B1TP: Tensor) -> tuple[Tensor, Tensor]:
    return latent_B1TR, rotary_B1TP


def _attend_to_latents(
    module: Any,
    query_BH1N: Tensor,
    latent_B1TR: Tensor,
    rotary_B1TP: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    nope, rank = module.qk_nope_head_dim, module.kv_lora_rank
    with _in_memory(module.kv_b_proj):
        weight_HNR = _expanded(module, query_BH1N.dtype).view(-1, nope + module.v_head_dim, rank)
    query_nope, query_rotary = query_BH1N[:, :, 0].split([nope, query_BH1N.shape[-1] - nope], dim=-1)
    query_BHR = torch.matmul(query_nope.transpose(0, 1), weight_HNR[:, :nope]).transpose(0, 1)
    # All heads attend to the same keys, so the head dimension is used as the query length.
    query = torch.cat((query_BHR, query_rotary), dim=-1)[:, None]
    keys = _side_by_side(latent_B1TR, rotary_B1TP)
    mixed_BHR = nn.functional.scaled_dot_product_attention(query, keys, keys, attn_mask=attention_mask, scale=scaling)[
        :, 0, :, :rank
    ]
    output_HBV = torch.matmul(mixed_BHR.transpose(0, 1), weight_HNR[:, nope:].transpose(1, 2))
    return output_HBV.transpose(0, 1)[:, None], None


def _side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Both concatenated along the last dimension; a view if they are already adjacent in memory (GrowingLayer, joint)."""
    width = left.shape[-1] + right.shape[-1]
    neighbours = (
        left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and right.storage_offset() - left.storage_offset() == left.shape[-1]
        and left.stride() == right.stride()
        and left.stride(-1) == 1
        and left.stride(-2) >= width
    )
    return left.as_strided((*left.shape[:-1], width), left.stride()) if neighbours else torch.cat((left, right), dim=-1)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend_to_latents)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
