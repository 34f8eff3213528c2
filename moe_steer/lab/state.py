"""The training state on disk: one safetensors file with weights, router biases and optimizer moments, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from moe_steer.headed_file import read_tensors
from moe_steer.write_aside import written_aside

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, object],
    progress: dict[str, float],
) -> None:
    """Write everything the next step depends on; the file appears complete or not at all."""
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value.detach().clone()
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"recipe": json.dumps(recipe), "progress": json.dumps(progress)})


def load_state(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, recipe: dict[str, object]
) -> dict[str, float]:
    """Restore a state into model and optimizer and return its progress; ValueError if it was made by another recipe."""
    metadata, tensors = read_tensors(path)
    found, recipe = json.loads(metadata["recipe"]), json.loads(json.dumps(recipe))
    if found != recipe:
        changed = sorted(key for key in found.keys() | recipe.keys() if found.get(key) != recipe.get(key))
        raise ValueError(
            f"{path} holds a training with another {', '.join(changed)}; use another --work folder or the same recipe"
        )
    model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    )
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
    progress: dict[str, float] = json.loads(metadata["progress"])
    return progress
