"""What both embedded models carry beside their weights: the special tokens' ids, and how they answer when nothing is said."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """As configurations name them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def generation_defaults(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """DeepSeek-R1's sampling, up to so many tokens."""
    return GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=max_new_tokens, **special_ids(tokenizer)
    )
