"""Where a checkpoint takes the plan's gains: the edits, what each loses, and notes for whoever serves it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_steer.baking.edits import Edit, StoredTensor, measure
from moe_steer.baking.numbers import ROUNDOFF, Rounding, is_power_of_two
from moe_steer.baking.planning import LOADERS, STEER_INSTEAD, EntryCertificate, Work, held_gain, off_by
from moe_steer.baking.safetensors.biases import plan_choice
from moe_steer.baking.safetensors.folder import (
    Checkpoint,
    CheckpointShape,
    checkpoint_shape,
    refuse_family,
    text_section,
)
from moe_steer.baking.safetensors.layouts import LayerPlaces, Parts, Placement, find_places, placement
from moe_steer.entries.expert_entry import ranges
from moe_steer.plan import ExpertGain, SteeringPlan

NEGLIGIBLE = 2.0**-20
"""A native scale is used when its error is at most this; else the place that loses less, because one rounded scale shifts a whole expert."""
_NEEDS_SCORING = ("deepseek_v3", "deepseek_v32", "kimi_k2")


def plan_experts(source: Checkpoint, plan: SteeringPlan, round_gains: bool) -> tuple[CheckpointShape, Work]:
    """Check the plan against the checkpoint and find the edits of its entries on experts."""
    refuse_family(source.config)
    layers, stacks = find_places(source.tensors)
    if len(stacks) > 1:
        raise ValueError(
            f"the checkpoint has several stacks of layers with experts ({', '.join(sorted(stacks))}): a layer number does not name one"
        )
    shape = checkpoint_shape(source.config, layers)
    plan.check(_as_planned(shape, plan))
    work = Work()
    plan_choice(source, shape, plan, work)
    for entry in plan.active_experts:
        if entry.gain == 1.0:
            continue
        _refuse_place(entry, layers[entry.layer], shape)
        _plan_gain(source, shape, layers[entry.layer], entry, round_gains, work)
    beyond = sorted(layer for layer in layers if layer >= shape.num_layers)
    if beyond and plan.active_experts:
        work.notes.append(
            f"layer {ranges(beyond)} (multi-token prediction) is unchanged: drafts are unsteered, what is accepted is not"
        )
    return shape, work


def _as_planned(shape: CheckpointShape, plan: SteeringPlan) -> CheckpointShape:
    """The shape with the model type that the plan has: a plan made on the text model alone has the text model's type."""
    made_for = (plan.model or {}).get("model_type")
    return dataclasses.replace(shape, model_type=shape.text_type) if made_for == shape.text_type else shape


def _refuse_place(entry: ExpertGain, places: LayerPlaces, shape: CheckpointShape) -> None:
    if entry.expert >= shape.num_experts - shape.zero_experts:
        raise ValueError(
            f"expert {entry.expert} at layer {entry.layer} is a zero expert (it returns its input unchanged) and has no weights to scale; {STEER_INSTEAD}"
        )
    if places.ambiguous:
        raise ValueError(
            f"layer {entry.layer} has several sets of experts ({', '.join(sorted(places.modules)[:2])}): a number does not name one"
        )
    if not shape.is_verified and places.strange:
        raise ValueError(
            f"model type {shape.model_type!r} is unknown and also has {places.strange[0]}, which may undo a scale: {STEER_INSTEAD}"
        )


@dataclass(frozen=True)
class _Candidate:
    """One way to bake a gain: the edits, and what each loses."""

    format: str
    applied: float
    edits: tuple[tuple[StoredTensor, Edit, Rounding], ...]

    @property
    def lost(self) -> Rounding:
        return sum((lost for _, _, lost in self.edits), Rounding())

    def certify(self, entry: ExpertGain) -> EntryCertificate:
        """The verdict: exact only for powers of two (and 0) that were asked for, which change no digit of any product."""
        lost = self.lost
        exact = (is_power_of_two(self.applied) or self.applied == 0) and not lost.inexact
        bounds = (max(ROUNDOFF.get(tensor.dtype, 0.0), one.worst) for tensor, _, one in self.edits)
        shift = off_by(entry.gain, self.applied)
        return EntryCertificate(
            layer=entry.layer,
            expert=entry.expert,
            gain=entry.gain,
            applied=self.applied,
            verdict="exact" if exact and not shift else "rounded",
            bound=shift + (0.0 if exact else max(bounds)),
            worst=shift + lost.worst,
            rms=math.hypot(shift, lost.rms),
            format=self.format,
            tensors=tuple(tensor.name for tensor, _, _ in self.edits),
            reversible=exact and self.applied != 0,
        )


def _plan_gain(
    source: Checkpoint, shape: CheckpointShape, places: LayerPlaces, entry: ExpertGain, round_gains: bool, work: Work
) -> None:
    where = f"layer {entry.layer} expert {entry.expert}"
    chosen = None
    if places.native_scale is not None:
        native = Placement("one scale an expert", (("weight", "multiply"),))
        chosen = _candidate(source, {"weight": places.native_scale}, shape.num_experts, native, entry, entry.gain)
    if chosen is None or chosen.lost.worst > NEGLIGIBLE:
        parts, num_rows = _parts(places, entry, shape, where)
        projection = placement(parts, where)
        powers_only = projection.powers_only or (projection.is_quantised and _declares_powers(source.config))
        divided = any(operation == "divide" for _, operation in projection.operations)
        stored = f"{where} is stored as {projection.format}"
        applied = held_gain(entry.gain, powers_only, not powers_only and not divided, stored, round_gains)
        other = _candidate(source, parts, num_rows, projection, entry, applied)
        chosen = other if chosen is None or other.lost.rms < chosen.lost.rms else chosen
    for tensor, edit, lost in chosen.edits:
        if lost.not_finite:
            raise ValueError(
                f"{tensor.name} holds {lost.not_finite} numbers that are NaN or infinite: fetch the checkpoint again"
            )
        if lost.overflowed:
            raise ValueError(
                f"gain {chosen.applied:g} takes {lost.overflowed} numbers of {tensor.name} out of the range of {tensor.dtype}: give a gain nearer to 1, or bake a checkpoint in a wider type"
            )
        work.add(tensor, edit, lost)
    work.entries.append(chosen.certify(entry))


def _candidate(
    source: Checkpoint, parts: Parts, num_rows: int, how: Placement, entry: ExpertGain, applied: float
) -> _Candidate:
    edits = []
    for role, operation in how.operations:
        begin, end = _run(parts[role], entry, num_rows)
        edit = Edit(operation=operation, begin=begin, end=end, layer=entry.layer, expert=entry.expert, factor=applied)
        edits.append((parts[role], edit, measure(source, parts[role], edit)))
    return _Candidate(how.format, applied, tuple(edits))


def _parts(places: LayerPlaces, entry: ExpertGain, shape: CheckpointShape, where: str) -> tuple[Parts, int]:
    """The expert's tensors by role, and how many experts share each (1: the tensor is the expert's own)."""
    if not places.per_expert:
        return places.fused, shape.num_experts - shape.zero_experts
    if entry.expert not in places.per_expert:
        raise ValueError(
            f"{where} has no tensors in this checkpoint, which has experts {ranges(sorted(places.per_expert))}"
        )
    return places.per_expert[entry.expert], 1


def _run(tensor: StoredTensor, entry: ExpertGain, num_rows: int) -> tuple[int, int]:
    """The bytes of one expert in a tensor whose first axis counts experts (or, in DBRX, holds them one under another)."""
    if num_rows == 1:
        return 0, tensor.num_bytes
    stacked = tensor.name.endswith("experts.mlp.w2") and len(tensor.shape) == 2 and tensor.shape[0] % num_rows == 0
    if not tensor.shape or (tensor.shape[0] != num_rows and not stacked):
        raise ValueError(
            f"{tensor.name} has shape {list(tensor.shape)} and expert {entry.expert} cannot be told apart in it among {num_rows}"
        )
    size = tensor.num_bytes // num_rows
    return entry.expert * size, (entry.expert + 1) * size


def _declares_powers(config: Mapping[str, Any]) -> bool:
    """Whether engines are told that the scales are powers of two, however wide their type is (DeepSeek-V3.1 and later)."""
    sections: Sequence[Any] = (config.get("quantization_config"), text_section(config).get("quantization_config"))
    return any(isinstance(section, Mapping) and section.get("scale_fmt") == "ue8m0" for section in sections)


def notes(
    source: Checkpoint,
    shape: CheckpointShape,
    entries: Sequence[EntryCertificate],
    loader: str | None,
    left_out: Sequence[str],
) -> list[str]:
    """Sentences for the certificate."""
    found = []
    if not shape.is_verified and any(entry.expert is not None for entry in entries):
        found.append(
            f"model type {shape.model_type!r} is not in the table: the tensor names are unambiguous, 'moe-steer verify --forward' shows whether they mean what they say"
        )
    for entry in entries:
        if entry.applied != entry.gain:
            found.append(
                f"layer {entry.layer} expert {entry.expert}: gain {entry.gain:g} was baked as {entry.applied:g}, the nearest power of two"
            )
    if any(entry.format == "FP8 with block scales" and entry.rounding for entry in entries):
        found.append(
            "vLLM with DeepGEMM may requantise to power-of-two scales (VLLM_USE_DEEP_GEMM_E8M0); gains that are powers of two stay exact there, others move by some percent"
        )
    text = text_section(source.config)
    if shape.text_type in _NEEDS_SCORING and not ("scoring_func" in text and "topk_method" in text):
        found.append(
            'config.json lacks "scoring_func": "sigmoid" and "topk_method": "noaux_tc": engines other than transformers would route by softmax; the source has the same gap'
        )
    dtype = (
        text.get("dtype") or text.get("torch_dtype") or source.config.get("dtype") or source.config.get("torch_dtype")
    )
    if dtype == "float16" and any(entry.applied > 1 for entry in entries):
        found.append(
            "the model runs in float16: louder experts may take activations beyond 65504; serve it in bfloat16"
        )
    if loader is not None:
        found.append(
            f"two tensors of one name are in this folder: it is steered in an engine that {LOADERS[loader]}; any other (vLLM with enable_multithread_load) may serve the plain model, so ask it with 'moe-steer verify --endpoint'"
        )
    if left_out:
        found.append(
            f"left out, for they hold the unsteered weights: {', '.join(left_out[:4])}{' ...' if len(left_out) > 4 else ''}"
        )
    return found
