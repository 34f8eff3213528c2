"""The lab model's architecture: DeepSeek-V3 in small (MLA, sigmoid router with correction bias and groups)."""

from __future__ import annotations

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerBase

from moe_steer.lab.generation_defaults import generation_defaults, special_ids
from moe_steer.lab.tokenizer import MAX_LENGTH


def lab_config(tokenizer: PreTrainedTokenizerBase) -> DeepseekV3Config:
    """Width 128, 4 layers of which the first is dense, 16 routed experts in 4 groups, 2 chosen, 1 shared."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special_ids(tokenizer),
    )


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> DeepseekV3ForCausalLM:
    """A freshly initialised model with its generation defaults set, in float32."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM._from_config(
        lab_config(tokenizer), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model.generation_config = generation_defaults(tokenizer, 256)
    return model.float()
