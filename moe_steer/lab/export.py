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
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors files are written for their owner alone, which a package must not keep


def restore_router_keys(config_path: Path) -> None:
    """Write the dropped keys back into a saved config.json."""
    config = json.loads(config_path.read_text())
    config.update(ROUTER_KEYS)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
