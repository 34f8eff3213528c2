"""The dense lab model's architecture: Qwen2 in small, as in DeepSeek-R1-Distill-Qwen (grouped-query attention, untied)."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from moe_steer.lab.generation_defaults import generation_defaults, special_ids
from moe_steer.lab.tokenizer import MAX_LENGTH

MAX_NEW_TOKENS = 384


def dense_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Width 128, 5 layers, 4 heads of 32 that share 2 key-value heads."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=416,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special_ids(tokenizer),
    )


def new_dense_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model with its generation defaults set, in float32."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM._from_config(dense_config(tokenizer), attn_implementation="sdpa")
    model.generation_config = generation_defaults(tokenizer, MAX_NEW_TOKENS)
    return model.float()
