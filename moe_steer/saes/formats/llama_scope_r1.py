"""Llama Scope R1 (DeepSeek-R1-Distill-Llama-8B): config.json and sae_weights.safetensors.

Like Llama Scope, but with the logarithm of one threshold per atom, and with the mean norms of the activations as tensors.
"""

from __future__ import annotations

from pathlib import Path

from moe_steer.saes.formats import llama_scope
from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given, pick, read_config, read_safetensors

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"


def recognises(path: Path) -> bool:
    """A folder with both files; SAELens, which uses the second name too, calls its configuration cfg.json."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """The thresholds are those of the scaled SAE, so they are only exponentiated."""
    config = read_config(path / CONFIG, **llama_scope.TYPES)
    weights_path = path / WEIGHTS
    tensors = read_safetensors(weights_path)
    mean_norm = tensors.get(f"{llama_scope.NORM}{config.get('hook_point_in')}")
    scale = llama_scope.scale_of(path, config, None if mean_norm is None else float(mean_norm))
    threshold_F = pick(tensors, weights_path, "log_jumprelu_threshold").exp()
    model_name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return llama_scope.build(
        path, config, tensors, weights_path, scale, threshold_F, "llama-scope-r1", model_name, given
    )
