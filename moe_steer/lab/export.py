"""The checkpoint written the way DeepSeek's own are, so that other engines route it right."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUTER_KEYS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Keys of DeepSeek's config.json that transformers 5 drops on saving; without them other engines route by softmax."""


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.config.model_type == "deepseek_v3":
        restore_router_keys(folder / "config.json")
    if model.config.model_type == "qwen2":
        name_tokenizer_class(folder / "tokenizer_config.json")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors files are written for their owner alone, which a package must not keep


def name_tokenizer_class(config_path: Path) -> None:
    """Let AutoTokenizer take tokenizer.json as it is: beside a Qwen2 model transformers 5 puts Qwen2's own splitting of words in its
    place, whatever class is named, except for the class that DeepSeek-R1-Distill-Qwen names."""
    config = json.loads(config_path.read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def restore_router_keys(config_path: Path) -> None:
    """Write the dropped keys back into a saved config.json."""
    config = json.loads(config_path.read_text())
    config.update(ROUTER_KEYS)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
