"""Published models: their configurations, written from their model cards, and what their makers say of their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_DEEPSEEK = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "max_position_embeddings": 163840,
}  # fmt: skip
_KIMI = {
    **_DEEPSEEK, "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "max_position_embeddings": 131072,
}  # fmt: skip
_GPT_OSS = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "num_experts_per_tok": 4, "max_position_embeddings": 131072,
}  # fmt: skip
_GEMMA = {"vocab_size": 256000, "sliding_window": 4096, "max_position_embeddings": 8192}
_V4 = {
    "vocab_size": 129280, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128,
    "max_position_embeddings": 1048576,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """``billions``: parameters as the maker states them, without vision towers and layers that predict further tokens."""

    model_type: str
    billions: float
    config: dict[str, Any]


PUBLISHED = {
    "gpt-oss-20b": Published(
        model_type="gpt_oss", billions=20.91, config={**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}
    ),
    "gpt-oss-120b": Published(
        model_type="gpt_oss", billions=116.83, config={**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}
    ),
    "gemma-2-2b": Published(
        model_type="gemma2",
        billions=2.61,
        config={
            **_GEMMA, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256,
        },
    ),
    "gemma-2-9b": Published(
        model_type="gemma2",
        billions=9.24,
        config={
            **_GEMMA, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256,
        },
    ),
    "gemma-2-27b": Published(
        model_type="gemma2",
        billions=27.23,
        config={
            **_GEMMA, "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128,
        },
    ),
    "Qwen3.5-35B-A3B": Published(
        model_type="qwen3_5_moe",
        billions=34.66,
        config={
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": {
                "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
                "num_key_value_heads": 2, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
                "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
                "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256,
                "num_experts_per_tok": 8, "full_attention_interval": 4, "max_position_embeddings": 262144,
            },
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            },
        },
    ),
    "GLM-5": Published(
        model_type="glm_moe_dsa",
        billions=744,
        config={
            "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048,
            "num_hidden_layers": 78, "num_attention_heads": 64, "num_key_value_heads": 64, "n_shared_experts": 1,
            "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 2048, "qk_rope_head_dim": 64, "v_head_dim": 256,
            "qk_nope_head_dim": 192, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "index_topk": 2048,
            "index_head_dim": 128, "index_n_heads": 32, "max_position_embeddings": 202752,
        },
    ),
    "Kimi-K2": Published(model_type="deepseek_v3", billions=1026, config=_KIMI),
    "DeepSeek-V3.2": Published(
        model_type="deepseek_v32",
        billions=671.9,
        config={**_DEEPSEEK, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    ),
    "DeepSeek-V4-Flash": Published(
        model_type="deepseek_v4",
        billions=284,
        config={
            **_V4, "hidden_size": 4096, "moe_intermediate_size": 2048, "num_hidden_layers": 43, "num_attention_heads": 64,
            "q_lora_rank": 1024, "o_groups": 8, "n_routed_experts": 256, "index_topk": 512,
        },
    ),
    "DeepSeek-V4-Pro": Published(
        model_type="deepseek_v4",
        billions=1600,
        config={
            **_V4, "hidden_size": 7168, "moe_intermediate_size": 3072, "num_hidden_layers": 61, "num_attention_heads": 128,
            "q_lora_rank": 1536, "o_groups": 16, "n_routed_experts": 384, "index_topk": 1024,
        },
    ),
    "MiniMax-M2": Published(
        model_type="minimax_m2",
        billions=228.7,
        config={
            "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256,
            "num_experts_per_tok": 8, "max_position_embeddings": 196608,
        },
    ),
}  # fmt: skip
