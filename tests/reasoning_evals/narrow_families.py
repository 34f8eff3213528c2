"""Models of the decoder families with narrow windows, chunks, pools and index budgets, so that short texts run beyond them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from families import FAMILIES, build_from_config

NARROW = {
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "index_topk": 8,
    "index_block_size": 4,
}
"""Settings of configurations that have them."""
COMPRESSED = {
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "index_topk_blocks": 2},
}  # fmt: skip
"""Entries of the table whose own kind of cache the table leaves out."""


ALONE = {"deepseek_v4", "minimax", "minimax_m3_vl_text", "unlimited_ocr"}
"""Families with a cache of their own: rows cannot be joined, and only prompts of one length share a batch."""


def generated(model: Any, prompts: Iterable[tuple[int, ...]], length: int) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompt -> the greedy tokens of ``model.generate`` for it alone, without an end."""
    settings = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": length, "max_new_tokens": length}
    model.generation_config.eos_token_id, found = None, {}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found[prompt] = tuple(out[0, len(prompt) :].tolist())
    return found


def until(tokens: tuple[int, ...], stops: Collection[int]) -> tuple[int, ...]:
    """The tokens up to the first that ends a text."""
    ends = [place + 1 for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] if ends else None]


@functools.cache
def narrow(name: str, **changes: Any) -> Any:
    """The family's model, float32, with these changes of its configuration."""
    family = FAMILIES[name]
    given = {**family.config, **COMPRESSED.get(name, {})}
    parts = [part for part in given.values() if isinstance(part, dict) and "vocab_size" in part]
    given = {key: {**part, **changes} if part in parts else part for key, part in given.items()} | (
        {} if parts else changes
    )
    config = CONFIG_MAPPING[family.model_type](**given)
    text = config.get_text_config(decoder=True)
    for key, value in NARROW.items():
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, value)
    if hasattr(text, "index_topk"):
        # Scores are sums of clipped heads; with two heads many are exactly 0, and which of equal scores is kept is arbitrary.
        text.index_n_heads = 16
    return build_from_config(config, family.model_class)
