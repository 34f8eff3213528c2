"""The lab as a GGUF file in llama.cpp's form of DeepSeek (deepseek2), as its converter writes it: experts of a layer in one tensor,
the up-projection of the latents split into that of keys, turned, and that of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from gguf_files import add_tokenizer
from moe_steer.json_files import read_json

SIGMOID = 2


def write_lab(path: Path, folder: Path, tokenizer: Any) -> Path:
    """Write the checkpoint of ``folder``, float32."""
    config = read_json(folder / "config.json", "")
    writer: Any = gguf.GGUFWriter(str(path), "deepseek2")
    latent, rotary, plain = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    heads, layers, value = config["num_attention_heads"], config["num_hidden_layers"], config["v_head_dim"]
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)  # the latents are one head that all queries share
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(rotary)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotary)
    writer.add_value_length(latent)
    writer.add_key_length_mla(plain + rotary)
    writer.add_value_length_mla(value)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(SIGMOID))
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    for name, values in _tensors(folder, config).items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    result = {}
    for name, values in found.items():
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            if rest.startswith("0."):
                part = rest.partition(".")[2]
                stacked = [found[f"{layer}.experts.{e}.{part}"] for e in range(config["n_routed_experts"])]
                result[f"{layer}.experts.{part}"] = np.stack(stacked)
        elif name.endswith("kv_b_proj.weight"):
            by_head = values.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            keys, of_values = np.split(by_head, [config["qk_nope_head_dim"]], axis=1)
            result[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
            result[name.replace("kv_b_proj", "v_b_proj")] = of_values
        else:
            result[name.replace("e_score_correction_bias", "e_score_correction.bias")] = values
    return result
