"""Tiny configurations of the families that came with transformers 5.23 and 5.24; ``available`` leaves out what is not installed."""

from __future__ import annotations

from typing import Any

from family_configs import (
    ALL,
    DELTA_NET,
    DENSE_FIRST,
    EXPERTS8,
    GROUPS,
    HEADS8,
    INDEXER,
    MLA,
    NOT_FIRST,
    ONE_GROUP,
    ROUTED8,
    SHARED_EXPERT,
    SLIDING,
)
from family_configs import BASE as _BASE
from family_configs_wrapped import IMAGE_TOKENS, MROPE, VISION

_SHORT_CONVOLUTIONS = {
    **HEADS8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 64,
    "d_rel": 4,
    "rel_extent": 64,
    "route_scale": 2.0,
    "unpadded_vocab_size": _BASE["vocab_size"],
    "mlp_gate_softcap": 1.0,
    "mlp_up_softcap": 2.0,
    "n_layers_per_attn_res_block": 1,
}
_SLIDING_LATENTS = {
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "shared_experts_intermediate_size": 16,
}

LATER_TEXT: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "dots3_note": (
        "dots3_note_text",
        NOT_FIRST,
        {**MLA, **ROUTED8, **GROUPS, **INDEXER, **SLIDING, **DENSE_FIRST, **_SLIDING_LATENTS, "head_dim": 16},
    ),
    "inkling2": (
        "inkling2_text",
        ALL,
        {**_SHORT_CONVOLUTIONS, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
    ),
    "lara_mini": (
        "lara_mini",
        ALL,
        {
            **HEADS8,
            **EXPERTS8,
            **SHARED_EXPERT,
            **DELTA_NET,
            **SLIDING,
            "intermediate_size": None,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
        },
    ),
    "sarvam_mla": (
        "sarvam_mla",
        NOT_FIRST,
        {**MLA, **ROUTED8, **GROUPS, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    ),
    "sarvam_moe": (
        "sarvam_moe",
        NOT_FIRST,
        {**HEADS8, **ROUTED8, **GROUPS, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    ),
}
"""As ``TEXT_CONFIGS``."""

LATER_WRAPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hy_v4_vl": (
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        {
            "text_config": {
                **_BASE,
                **MLA,
                **ROUTED8,
                **ONE_GROUP,
                **INDEXER,
                **DENSE_FIRST,
                "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]},
                "hc_mult": 2,
                "swiglu_limit": 0.5,
            },
            "vision_config": {**VISION, "out_hidden_size": 32, "max_image_size": 64},
            **IMAGE_TOKENS,
        },
    ),
}
"""As ``WRAPPED_CONFIGS``."""

LOOPED: dict[str, Any] = {
    **_SHORT_CONVOLUTIONS,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_num_passes": 3,
    "loop_gate_rank": 4,
}
"""Overrides of BASE for inkling2_loop_text, whose middle layer runs three times in a forward."""
