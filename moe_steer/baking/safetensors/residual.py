"""Residual vectors as biases: where an architecture ends a layer with ``residual + linear(x) + bias``, a vector added at the
layer's output at every token is a bias.

Such places are few: the MLP's last projection in Llama, SmolLM3, Seed-OSS and Nemotron with ``mlp_bias``, GPT-NeoX, Phi and
StarCoder2. Llama, SmolLM3 and Seed-OSS checkpoints without biases get them (zero elsewhere) and ``mlp_bias: true`` in config.json.
Layers that end in a norm (Gemma, OLMo-2), scale their branch (Granite) or route (any mixture of experts) have no such place.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from moe_steer.baking.edits import Edit, NewTensor
from moe_steer.baking.numbers import ROUNDOFF, Rounding, add_floats
from moe_steer.baking.planning import EntryCertificate, Work
from moe_steer.baking.safetensors.families import CheckpointShape
from moe_steer.baking.safetensors.folder import Checkpoint
from moe_steer.plan import ResidualVector, SteeringPlan

_PLACES = {
    "llama": "model.layers.{}.mlp.down_proj",
    "smollm3": "model.layers.{}.mlp.down_proj",
    "seed_oss": "model.layers.{}.mlp.down_proj",
    "nemotron": "model.layers.{}.mlp.down_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "starcoder2": "model.layers.{}.mlp.c_proj",
}
_CAN_GET_BIASES = ("llama", "smollm3", "seed_oss")


def plan_residual(source: Checkpoint, shape: CheckpointShape, plan: SteeringPlan, work: Work) -> list[NewTensor]:
    """Take the residual entries into ``work``; returns the tensors to be created. ValueError where there is no place."""
    entries = plan.active_residual
    if not entries:
        return []
    template = _PLACES.get(shape.model_type)
    quantised = "quantization_config" in source.config
    if template is None or quantised or shape.moe_layers:
        why = "a quantised checkpoint" if quantised else f"{shape.model_type or 'this architecture'}"
        raise ValueError(
            f"the residual vector of layer {entries[0].layer} has no place in {why}: steer in process, or export it as a GGUF control vector (--control-vector FILE)"
        )
    vectors_LD = _summed(plan, entries)
    names = {layer: template.format(layer) + ".bias" for layer in vectors_LD}
    if all(name in source.tensors for name in names.values()):
        lost = {layer: _edit(source, names[layer], layer, vector_D, work) for layer, vector_D in vectors_LD.items()}
        created: list[NewTensor] = []
    elif shape.model_type in _CAN_GET_BIASES and not source.config.get("mlp_bias"):
        created, lost = _created(source, shape, template, vectors_LD)
        work.notes.append("config.json now says mlp_bias: true; an engine that ignores it does not steer")
    else:
        missing = next(name for name in names.values() if name not in source.tensors)
        raise ValueError(
            f"the checkpoint has no {missing} that could take the vector: steer in process, or export it as a GGUF control vector (--control-vector FILE)"
        )
    for entry in entries:
        rounding, dtype = lost[entry.layer]
        work.entries.append(
            EntryCertificate(
                layer=entry.layer,
                expert=None,
                gain=entry.strength,
                applied=entry.strength,
                verdict="rounded",  # the sum of the layer is taken in another order
                bound=max(ROUNDOFF[dtype], rounding.worst),
                worst=rounding.worst,
                rms=rounding.rms,
                format=f"bias in {dtype}",
                tensors=(names[entry.layer],),
                reversible=True,
            )
        )
    return created


def _summed(plan: SteeringPlan, entries: tuple[ResidualVector, ...]) -> dict[int, np.ndarray[Any, Any]]:
    """Layer -> the sum of what its entries add, float64."""
    sums: dict[int, np.ndarray[Any, Any]] = {}
    for entry in entries:
        shift_D = plan.load_shift(entry).numpy()
        sums[entry.layer] = sums[entry.layer] + shift_D if entry.layer in sums else shift_D
    return sums


def _edit(
    source: Checkpoint, name: str, layer: int, vector_D: np.ndarray[Any, Any], work: Work
) -> tuple[Rounding, str]:
    tensor = source.tensors[name]
    if tensor.dtype not in ROUNDOFF or tensor.shape != vector_D.shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}: a bias of {len(vector_D)} plain numbers is needed"
        )
    old = b"".join(piece for _, piece in source.pieces(tensor))
    new, lost = add_floats(old, tensor.dtype, vector_D)
    work.add(tensor, Edit(operation="replace", begin=0, end=len(old), layer=layer, old=old, new=new), lost)
    return _within_range(lost, name, tensor.dtype), tensor.dtype


def _created(
    source: Checkpoint, shape: CheckpointShape, template: str, vectors_LD: dict[int, np.ndarray[Any, Any]]
) -> tuple[list[NewTensor], dict[int, tuple[Rounding, str]]]:
    """Biases for all three projections of every layer, zero except for the vectors."""
    created, lost = [], {}
    for layer in range(shape.num_layers):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            module = template.format(layer).replace("down_proj", projection)
            weight = source.tensors.get(f"{module}.weight")
            if weight is None or weight.dtype not in ROUNDOFF or len(weight.shape) != 2:
                raise ValueError(
                    f"{module}.weight is not a plain matrix in this checkpoint, so it cannot be given a bias"
                )
            width = weight.shape[0]
            data = bytes(width * weight.num_bytes // (weight.shape[0] * weight.shape[1]))
            if projection == "down_proj" and layer in vectors_LD:
                data, rounding = add_floats(data, weight.dtype, vectors_LD[layer])
                lost[layer] = (_within_range(rounding, f"{module}.bias", weight.dtype), weight.dtype)
            created.append(NewTensor(f"{module}.bias", weight.dtype, (width,), data))
    return created, lost


def _within_range(lost: Rounding, name: str, dtype: str) -> Rounding:
    if lost.overflowed:
        raise ValueError(
            f"the vector takes {lost.overflowed} numbers of {name} out of the range of {dtype}: lower its strength"
        )
    return lost


def with_biases(config_text: str) -> tuple[str, str]:
    """(old, new) pieces of config.json that switch mlp_bias on."""
    match = re.search(r'"mlp_bias"\s*:\s*(?:false|null)', config_text)
    if match:
        return match[0], '"mlp_bias": true'
    brace = config_text[: config_text.index("{") + 1]
    return brace, brace + '\n  "mlp_bias": true,'
