"""The embedded MoE model as a GGUF file, as llama.cpp's own converter lays out its architecture ``deepseek2``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from moe_steer.lab import LAB_MODEL

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write_lab_gguf(path: Path, folder: Path = LAB_MODEL) -> Path:
    """Write it, or a form of it in another folder, in float32; returns the path."""
    config = json.loads((folder / "config.json").read_text())
    writer: Any = gguf.GGUFWriter(str(path), "deepseek2")
    _settings(writer, config)
    _vocabulary(writer)
    for name, values in _tensors(load_file(folder / "model.safetensors"), config):
        writer.add_tensor(name, np.ascontiguousarray(values.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(writer: Any, config: dict[str, Any]) -> None:
    """Attention is stored as one key-value head of the latent size, which llama.cpp expands to the heads' own sizes."""
    rope, nope, latent = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    writer.add_name("lab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _vocabulary(writer: Any) -> None:
    data = json.loads((Path(LAB_MODEL) / "tokenizer.json").read_text())
    ids = data["model"]["vocab"] | {item["content"]: item["id"] for item in data["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for item in data["added_tokens"]:
        types[item["id"]] = gguf.TokenType.CONTROL if item["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(source: dict[str, np.ndarray], config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    found = [
        ("token_embd.weight", source["model.embed_tokens.weight"]),
        ("output_norm.weight", source["model.norm.weight"]),
        ("output.weight", source["lm_head.weight"]),
    ]
    heads, nope, v_dim = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        before, block = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in NAMES.items():
            if (values := source.get(f"{before}{theirs}.weight")) is not None:
                found.append((f"{block}{ours}.weight", values))
        both_HXR = source[f"{before}self_attn.kv_b_proj.weight"].reshape(heads, nope + v_dim, -1)
        found.append((f"{block}attn_k_b.weight", both_HXR[:, :nope].transpose(0, 2, 1)))
        found.append((f"{block}attn_v_b.weight", both_HXR[:, nope:]))
        if layer < config["first_k_dense_replace"]:
            continue
        found.append((f"{block}exp_probs_b.bias", source[f"{before}mlp.gate.e_score_correction_bias"]))
        for part in ("gate", "up", "down"):
            experts = [
                source[f"{before}mlp.experts.{expert}.{part}_proj.weight"]
                for expert in range(config["n_routed_experts"])
            ]
            found.append((f"{block}ffn_{part}_exps.weight", np.stack(experts)))
    return found
