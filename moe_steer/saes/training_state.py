"""Everything the next training step depends on, in one safetensors file that is replaced whole."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_steer.files import read_headed, write_whole, written_aside
from moe_steer.json_files import check_types, quoted, read_json
from moe_steer.saes.training_step import Weights

MAX_SEED = 1 << 40
"""Generators are seeded with multiples of it, in 64 bits."""
_KEY = "training"
"""Where the file's metadata keeps the header."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_NAMES = ("W_enc_DF", "b_enc_F", "W_dec_FD", "b_dec_D")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecipe:
    """The settings that determine the trained SAE, together with the activations."""

    width: int
    """F, the number of atoms."""
    k: int
    """Active atoms a token, on average over a batch."""
    steps: int
    """Optimizer steps of one batch each."""
    learning_rate: float | None = None
    """Peak of Adam's rate, for activations scaled to variance 1; default 0.1 / sqrt(D): a tenth of an atom's typical entry."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_share: float = 0.5
    """Last share of the training, in which the rate decreases linearly to 0."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss that revives dead atoms."""
    dead_after_steps: int = 50
    """An atom that was inactive for so many batches counts as dead."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("width", "k", "steps", "dead_after_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.k > self.width:
            raise ValueError(f"k is {self.k} and width {self.width}: no more atoms can be active than there are")
        if abs(self.seed) > MAX_SEED:
            raise ValueError(f"seed is {quoted(self.seed)}: give a whole number of at most {MAX_SEED}")
        rate = 0.5 if self.learning_rate is None else self.learning_rate
        if not (0 < rate < 1 and 0 <= self.decay_share <= 1 and self.aux_weight >= 0):
            raise ValueError(
                f"learning_rate {self.learning_rate}, decay_share {self.decay_share}, aux_weight {self.aux_weight}: give 0-1, 0-1, >= 0"
            )

    def rate_at(self, step: int, d_in: int) -> float:
        """The learning rate of a step, counted from 0."""
        peak = 0.1 / math.sqrt(d_in) if self.learning_rate is None else self.learning_rate
        rising = (step + 1) / max(1, self.warmup_steps)
        falling = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return peak * min(1.0, rising, falling)


@dataclass(kw_only=True)
class TrainingState:
    """The state of a training between two steps."""

    weights: Weights
    idle_F: Tensor
    """Number of batches since each atom was last active."""
    scale: float
    """Factor by which raw activations are multiplied."""
    threshold: float = 0.0
    """Running mean of the smallest selected activation."""
    step: int = 0
    """Number of finished steps."""
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(list(self.weights.fields().values()), lr=0.0, betas=(0.9, 0.999))


def save_state(path: Path, state: TrainingState, recipe: TrainRecipe) -> None:
    """Numbers are stored in the header as text that reads back exactly."""
    tensors = {**state.weights.fields(), "idle": state.idle_F}
    for name, parameter in state.weights.fields().items():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = state.optimizer.state[parameter][moment]
    progress = {"step": state.step, "threshold": state.threshold, "scale": state.scale}
    # One metadata entry only: several would be written in no fixed order.
    header = {_KEY: json.dumps({"recipe": dataclasses.asdict(recipe), "progress": progress})}
    with written_aside(path) as aside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata=header)


def load_state(path: Path, recipe: TrainRecipe, d_in: int, device: torch.device) -> TrainingState:
    """ValueError, in one line, for a damaged file and for one of another recipe or width."""
    header, _, tensors = read_headed(path, _KEY, "remove it to begin the training again")
    if header is None:
        raise ValueError(f"{path} holds no training: use another folder")
    found, wanted = header.get("recipe"), json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not isinstance(found, dict) or set(header) != {"recipe", "progress"}:
        raise ValueError(f"{path} holds no recipe of a training: use another folder")
    if found != wanted:
        changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise ValueError(
            f"{path} holds a training with another {', '.join(changed)}: use another folder, or the same recipe"
        )
    _check_content(path, header.get("progress"), tensors, recipe)
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


def _check_content(path: Path, progress: Any, tensors: Mapping[str, Tensor], recipe: TrainRecipe) -> None:
    """ValueError for what ``save_state`` did not write."""
    moments = {f"{moment}.{name}" for moment in _MOMENTS for name in _NAMES}
    types = {"step": int, "threshold": float, "scale": float}
    if not isinstance(progress, dict) or set(progress) != set(types) or set(tensors) != {*_NAMES, "idle", *moments}:
        raise ValueError(f"{path} is no state of a training: remove it to begin the training again")
    if check_types(progress, str(path), types)["step"] not in range(recipe.steps + 1):
        raise ValueError(f"{path} says step {quoted(progress['step'])}: remove it to begin the training again")


def remember_data(work: Path, data: dict[str, Any]) -> None:
    """Record in a training's folder what it reads; ValueError if it was started on other data."""
    path = work / "data.json"
    again = f"use another folder, or remove {work} to begin the training again"
    if path.exists() and read_json(path, again) != data:
        raise ValueError(
            f"{work} holds a training on another model, layer, texts or batches: use another folder, or the same options"
        )
    write_whole(path, json.dumps(data, indent=2) + "\n")
