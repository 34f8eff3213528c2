"""Everything the next training step depends on, in one safetensors file that is replaced whole."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_steer.headed_file import read_tensors
from moe_steer.saes.files import read_json
from moe_steer.saes.training_step import Weights
from moe_steer.write_aside import write_text, written_aside

if TYPE_CHECKING:
    from moe_steer.saes.training import TrainRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_NAMES = ("W_enc_DF", "b_enc_F", "W_dec_FD", "b_dec_D")


@dataclass(kw_only=True)
class TrainingState:
    """A training between two steps."""

    weights: Weights
    idle_F: Tensor
    """Batches since each atom was last active."""
    scale: float
    """What raw activations are multiplied by."""
    threshold: float = 0.0
    """Running mean of the smallest selected activation."""
    step: int = 0
    """Steps done."""
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(list(self.weights.fields().values()), lr=0.0, betas=(0.9, 0.999))


def save_state(path: Path, state: TrainingState, recipe: TrainRecipe) -> None:
    """Numbers go into the header as text that reads back exactly."""
    tensors = {**state.weights.fields(), "idle": state.idle_F}
    for name, parameter in state.weights.fields().items():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = state.optimizer.state[parameter][moment]
    progress = {"step": state.step, "threshold": state.threshold, "scale": state.scale}
    # One entry: the order of several would change from file to file.
    header = {"training": json.dumps({"recipe": dataclasses.asdict(recipe), "progress": progress})}
    with written_aside(path) as aside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata=header)


def load_state(path: Path, recipe: TrainRecipe, d_in: int, device: torch.device) -> TrainingState:
    """ValueError, in one line, for a damaged file and for one that another recipe or another width began."""
    header, tensors = _read(path)
    found, wanted = header["recipe"], json.loads(json.dumps(dataclasses.asdict(recipe)))
    if found != wanted:
        changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise ValueError(
            f"{path} holds a training with another {', '.join(changed)}: use another folder, or the same recipe"
        )
    if tensors["b_dec_D"].shape != (d_in,):
        raise ValueError(
            f"{path} holds a training on width {len(tensors['b_dec_D'])}, these activations have width {d_in}: use another folder"
        )
    progress = header["progress"]
    state = TrainingState(
        weights=Weights(**{name: tensors[name].to(device) for name in _NAMES}),
        idle_F=tensors["idle"].to(device),
        scale=progress["scale"],
        threshold=progress["threshold"],
        step=progress["step"],
    )
    for name, parameter in state.weights.fields().items():
        moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        state.optimizer.state[parameter] = {
            moment: value if moment == "step" else value.to(device) for moment, value in moments.items()
        }
    return state


def remember_data(work: Path, data: dict[str, Any]) -> None:
    """Note in a training's folder what it reads; ValueError when it was begun on something else."""
    path = work / "data.json"
    if path.exists() and _noted(path) != data:
        raise ValueError(
            f"{work} holds a training on another model, layer, texts or batches: use another folder, or the same options"
        )
    write_text(path, json.dumps(data, indent=2) + "\n")


def _noted(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: use another folder, or remove {path.parent} to begin the training again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        metadata, tensors = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to begin the training again") from error
    if "training" not in metadata:
        raise ValueError(f"{path} holds no training: use another folder")
    return json.loads(metadata["training"]), tensors
