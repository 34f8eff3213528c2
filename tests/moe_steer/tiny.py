"""Tiny random models and a tiny tokenizer for the tests of this room."""

from __future__ import annotations

import functools
from typing import Any

import torch

VOCAB = 100
THINK, END_THINK, STOP = 97, 98, 99
TEXTS = {
    10: "so.", 20: "really?", 30: "line\n", 40: "\n", 50: "end.\n\n", 11: ".", 21: " then", 31: "4", 41: "x", 51: "approx", 12: " ",
    22: "...", 32: "word",
}  # fmt: skip


def randomise(model: torch.nn.Module, seed: int = 0) -> Any:
    """Spread the weights, so that routing varies between tokens and a steered layer moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
            elif "e_score_correction_bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


@functools.cache
def deepseek_v3() -> Any:
    """4 layers, the first dense, 16 experts in 4 groups, top 4, a shared expert, MLA attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=STOP,
    )
    return randomise(DeepseekV3ForCausalLM(config))


@functools.cache
def qwen3_moe() -> Any:
    """3 layers, 8 experts, top 2."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=STOP,
    )
    return randomise(Qwen3MoeForCausalLM(config))


@functools.cache
def qwen2() -> Any:
    """A dense model of 3 layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=STOP,
    )
    return randomise(Qwen2ForCausalLM(config))


class TinyTokenizer:
    """As much of a tokenizer as the scopes need: two tags, and a few tokens that end a sentence, a line or a paragraph."""

    unk_token_id = None
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {"<think>": THINK, "</think>": END_THINK}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.get_vocab().get(text, VOCAB - 1)]}

    def __len__(self) -> int:
        return VOCAB

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        return [TEXTS.get(row[0], f"w{row[0]}") for row in rows]

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(self.batch_decode([[int(i)] for i in ids]))


def hook_count(model: torch.nn.Module) -> int:
    """Hooks of the package, of every kind, on every module. transformers leaves hooks of its own on a model that was once asked for
    hidden states, whichever test asked."""
    hooks = [
        hook for m in model.modules() for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()
    ]
    return sum(getattr(hook, "__module__", "").startswith("moe_steer") for hook in hooks)
