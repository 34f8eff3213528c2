"""Tiny checkpoints that the sharded runs load: one folder a family, float32, random weights under a fixed seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from launch.core.ranks import Ranks, ranks_of_this_run
from tiny import STOP, VOCAB, randomise

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 4, "moe_intermediate_size": 32}
_DEEPSEEK = {
    **_MOE,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_QWEN3 = {**_MOE, "num_experts": 16, "num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "deepseek_v3_fp8": ("deepseek_v3", _DEEPSEEK),
    "deepseek_v3_bf16": ("deepseek_v3", _DEEPSEEK),
    "qwen3_moe_bf16": ("qwen3_moe", _QWEN3),
    "qwen3_moe": ("qwen3_moe", _QWEN3),
    "glm4_moe": (
        "glm4_moe",
        {
            **_MOE,
            "n_routed_experts": 16,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "norm_topk_prob": True,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 32,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
}
"""The models that every backend runs or refuses by name."""
MID = {
    **_DEEPSEEK,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "n_routed_experts": 64,
    "vocab_size": 4000,
}
"""About 110 million parameters, 430 MiB: large enough to see what loading takes."""
WIDE = {**_DEEPSEEK, "hidden_size": 256, "moe_intermediate_size": 128}
"""Stacked experts of 2 and 4 MiB, so that half of one is enough for a file on NVMe."""
PRESET_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {**_DEEPSEEK, "topk_method": "group_limited_greedy", "n_shared_experts": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_MOE,
            "num_experts": 16,
            "shared_expert_intermediate_size": 48,
            "num_key_value_heads": 2,
            "norm_topk_prob": False,
        },
    ),
}
"""More families that DeepSpeed's AutoEP has a preset for."""
_FP8_BLOCK = 16  # DeepSeek-R1 has 128; a tiny layer of 32 must still divide among ranks


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family with a word-per-id tokenizer, unless it is there; returns its folder."""
    target = folder / name
    if (target / "tokenizer.json").exists():
        return target
    model_type, overrides = {**CONFIGS, **PRESET_CONFIGS, "mid": ("deepseek_v3", MID), "wide": ("deepseek_v3", WIDE)}[
        name
    ]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**_BASE, **overrides})
    model = randomise(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager" if model_type == "gpt_oss" else None)
    )
    model.generation_config.eos_token_id = STOP
    if name.endswith("_bf16"):
        _round_weights(model)
    model.save_pretrained(target)
    if name.endswith("_fp8"):
        _to_block_fp8(target)
    _tokenizer().save_pretrained(target)
    return target


def _round_weights(model: Any) -> None:
    """To bfloat16, but for what the family keeps in float32 (buffers, as in DeepSeek's own checkpoints)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "<think>": 97, "</think>": 98, "</s>": STOP}
    words.update({f"w{i}": i for i in range(2, 97)})
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def _to_block_fp8(folder: Path) -> None:
    """Rewrite a checkpoint the way DeepSeek-R1 is stored: float8_e4m3 blocks, each with a float32 scale."""
    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") and not name.endswith("_proj_with_mqa.weight"):
            packed[name] = tensor
            continue
        rows, columns = (-(-size // _FP8_BLOCK) for size in tensor.shape)
        scale = torch.empty(rows, columns)
        weight = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                block = (slice(i * _FP8_BLOCK, (i + 1) * _FP8_BLOCK), slice(j * _FP8_BLOCK, (j + 1) * _FP8_BLOCK))
                scale[i, j] = tensor[block].abs().max() / 448
                weight[block] = (tensor[block] / scale[i, j]).to(torch.float8_e4m3fn)
        packed[name], packed[f"{name}_scale_inv"] = weight, scale
    save_file(packed, str(file), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def run_cases(compare: Callable[[str, str, Path, Ranks], Any]) -> None:
    """What a worker does: all cases of ``worker.py OUT FOLDER backend:model ...``; this rank's results go to OUT/rank<k>.json."""
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    results: dict[str, Any] = {}
    with ranks_of_this_run() as ranks:
        for case in sys.argv[3:]:
            backend, _, name = case.partition(":")
            if ranks.is_main:
                save_checkpoint(name, folder)
            ranks.barrier()
            try:
                results[case] = compare(backend, name, folder, ranks)
            except ValueError as error:
                results[case] = {"refused": str(error)}
            (out / f"rank{ranks.rank}.json").write_text(json.dumps(results))
