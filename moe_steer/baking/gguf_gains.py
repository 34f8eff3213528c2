"""Where a GGUF model takes the plan's gains: the bytes of each expert's down projection, and whether they can hold the gain."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_steer.baking.edits import Edit, StoredTensor, measure
from moe_steer.baking.gguf_model import BLOCK_FORMATS, NAMES, GgufModel, block_format
from moe_steer.baking.numbers import Rounding, is_power_of_two, shown
from moe_steer.baking.planning import STEER_INSTEAD, EntryCertificate, Work, held_gain, off_by
from moe_steer.gguf import architectures_of, gguf_package, letters
from moe_steer.plan import ExpertGain, SteeringPlan

_DOWN = re.compile(r"^blk\.(\d+)\.ffn_down_exps\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufShape:
    """What ``SteeringPlan.check`` compares a plan with."""

    model_type: str
    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]
    hidden_size: int


def plan_gains(model: GgufModel, plan: SteeringPlan, round_gains: bool) -> Work:
    """Check the plan against the model and find the edits of its expert gains, one run of bytes an expert and tensor."""
    choosing = next((entry for entry in plan.experts if entry.acts_on_choice), None)
    if choosing is not None:
        raise ValueError(
            f"layer {choosing.layer} expert {choosing.expert} {choosing.action} is not baked into GGUF files: bake the safetensors checkpoint and convert that, or {STEER_INSTEAD}"
        )
    _refuse_architecture(model, plan)
    work = Work(notes=_check_fit(model, plan))
    _refuse_overlap(
        model, {tensor.name for entry in plan.active_experts for tensor in _expert_tensors(model, entry.layer)}
    )
    for entry in plan.active_experts:
        runs = list(_runs(model, entry, round_gains))
        losses = [measure(model, run, edit) for run, edit in runs]
        for (run, edit), lost in zip(runs, losses, strict=True):
            _refuse_loss(run, edit, lost, round_gains)
            work.add(run, edit, lost)
        found = [(run.name, run.dtype, lost) for (run, _), lost in zip(runs, losses, strict=True)]
        work.entries.append(certify(entry.layer, entry.expert, entry.gain, runs[0][1].factor, found))
    return work


def certify(
    layer: int, expert: int, gain: float, applied: float, found: list[tuple[str, str, Rounding]]
) -> EntryCertificate:
    """The verdict on an entry, from (name, type, what was lost) of its tensors.

    Exact: dequantised values after = dequantised values before times the gain asked for, bit for bit (for 0: all zero).
    """
    shift = off_by(gain, applied)
    exact = [is_exact(gain, applied, lost) for _, _, lost in found]
    bounds = [
        0.0 if sure else shift + max(BLOCK_FORMATS[dtype].roundoff if lost.inexact else 0.0, lost.worst)
        for sure, (_, dtype, lost) in zip(exact, found, strict=True)
    ]
    return EntryCertificate(
        layer=layer,
        expert=expert,
        gain=gain,
        applied=applied,
        verdict="exact" if all(exact) else "rounded",
        bound=max(bounds),
        worst=shift + max(lost.worst for _, _, lost in found),
        rms=None,
        format=", ".join(dict.fromkeys(dtype for _, dtype, _ in found)),
        tensors=tuple(name for name, _, _ in found),
        reversible=is_power_of_two(applied) and not any(lost.inexact for _, _, lost in found),
    )


def is_exact(gain: float, applied: float, lost: Rounding) -> bool:
    """Whether one tensor's scales hold the gain asked for bit for bit."""
    return (is_power_of_two(applied) or applied == 0) and not lost.inexact and applied == gain


def _shape_of(model: GgufModel) -> GgufShape:
    """Layers with experts from the tensor names, expert count from the metadata.

    Blocks that only predict further tokens (``nextn_predict_layers``) are not counted as decoder layers.
    """
    layers = sorted(int(match[1]) for match in map(_DOWN.match, model.tensors) if match)
    numbers = model.numbers
    return GgufShape(
        model_type=model.architecture,
        num_layers=numbers.get("block_count", 0) - numbers.get("nextn_predict_layers", 0),
        num_experts=numbers.get("expert_count", 0),
        moe_layers=tuple(layers),
        hidden_size=numbers.get("embedding_length", 0),
    )


def _check_fit(model: GgufModel, plan: SteeringPlan) -> list[str]:
    """Refuse a plan that does not fit the model (ValueError names the entry); returns notes for the certificate."""
    shape = _shape_of(model)
    if plan.active_experts and not shape.num_experts:
        raise ValueError(
            f"{model.first.name} ({model.architecture}) names no {model.architecture}.expert_count: it is a dense model, or it was converted wrongly"
        )
    if plan.active_experts and not shape.moe_layers:
        raise ValueError(
            f"{model.first.name} holds no blk.N.ffn_down_exps.weight: it is a dense model, or an old file with one tensor per expert, to be converted again"
        )
    notes = _compare_type(plan.model or {}, model.architecture)
    if plan.active_experts and model.architecture not in gguf_package().MODEL_ARCH_NAMES.values():
        notes.append(
            f"architecture {model.architecture!r} is newer than the gguf package: that nothing follows its experts' down projection one by one could not be checked"
        )
    wanted: Mapping[str, Any] = plan.model or {}
    if wanted.get("model_type") is not None:
        shape = replace(shape, model_type=wanted["model_type"])
    if wanted.get("num_layers") == model.numbers.get("block_count"):
        shape = replace(shape, num_layers=wanted["num_layers"])
    plan.check(shape)
    return notes


def _refuse_architecture(model: GgufModel, plan: SteeringPlan) -> None:
    """ValueError for an architecture on which no factor on the down projection has the plan's effect."""
    if plan.active_experts and model.architecture == "llama4":
        raise ValueError(
            "llama4 scales the input of an expert, not its output: a factor on the down projection is another plan, so it is refused"
        )
    if plan.active_experts and any(".ffn_down_chexps." in name for name in model.tensors):
        raise ValueError(
            f"{model.architecture} has chunk experts (ffn_down_chexps) that share the router's weights: a factor on ffn_down_exps alone is another plan, so it is refused"
        )


def _compare_type(wanted: Mapping[str, Any], architecture: str) -> list[str]:
    model_type = wanted.get("model_type")
    if model_type is None or letters(model_type) == letters(architecture):
        return []
    known = architectures_of(model_type)
    if not known:
        return [f"the plan was made for {model_type!r}; that {architecture!r} is the same family could not be checked"]
    if architecture not in known:
        raise ValueError(
            f"the plan was made for {model_type!r}, which GGUF calls {' or '.join(known)}; this file is {architecture!r}"
        )
    return []


def _expert_tensors(model: GgufModel, layer: int) -> Iterator[StoredTensor]:
    """The tensors whose slices are multiplied, experts being their slowest dimension.

    An engine computes ``weight_e * (scale_e * (down_e @ x) + bias_e)``. Where a file has a scale per expert (Gemma-4's
    ``per_expert_scale``, NVFP4's second level), that one float32 is multiplied and the blocks stay as they are.
    """
    prefix = f"blk.{layer}.ffn_down_exps"
    yield model.tensors.get(f"{prefix}.scale") or model.tensors[f"{prefix}.weight"]
    if f"{prefix}.bias" in model.tensors:
        yield model.tensors[f"{prefix}.bias"]


def _runs(model: GgufModel, entry: ExpertGain, round_gains: bool) -> Iterator[tuple[StoredTensor, Edit]]:
    """The bytes of one expert in each of its tensors, and what happens to them."""
    num_experts = model.numbers["expert_count"]
    tensors = [(tensor, block_format(tensor.name, tensor.dtype)) for tensor in _expert_tensors(model, entry.layer)]
    powers = next((form for _, form in tensors if form.number == "E8M0"), None)
    stored = f"layer {entry.layer} expert {entry.expert} is stored as {(powers or tensors[0][1]).name}"
    applied = held_gain(entry.gain, powers is not None, True, stored, round_gains)
    for tensor, form in tensors:
        if tensor.shape[-1] != num_experts:
            raise ValueError(
                f"{tensor.name} has the shape {list(tensor.shape)}, whose last number should be expert_count = {num_experts}: the file contradicts itself"
            )
        if tensor.num_bytes % (num_experts * form.num_bytes):
            raise ValueError(
                f"{tensor.name}: an expert's share of {tensor.num_bytes} bytes is not a whole number of {form.name} blocks"
            )
        size = tensor.num_bytes // num_experts
        begin = tensor.begin + entry.expert * size
        edit = Edit(operation="multiply", begin=0, end=size, layer=entry.layer, expert=entry.expert, factor=applied)
        yield replace(tensor, begin=begin, end=begin + size), edit


def _refuse_loss(run: StoredTensor, edit: Edit, lost: Rounding, round_gains: bool) -> None:
    """ValueError for scales that are not finite, too large, or (unless rounding was allowed) too small for the format."""
    form = BLOCK_FORMATS[run.dtype]
    where, number = f"layer {edit.layer} expert {edit.expert}: {run.name} ({run.dtype})", NAMES[form.number]
    if lost.not_finite:
        raise ValueError(f"{where} holds {lost.not_finite} scales that are NaN or infinite: the file is damaged")
    if lost.overflowed:
        fits = 2.0 ** math.floor(math.log2(form.largest / lost.largest))
        raise ValueError(
            f"{where} cannot hold the gain {shown(edit.factor)}: {lost.overflowed} scales would pass {number}'s largest number {form.largest:g} "
            f"(largest now {lost.largest:g}): the largest power of two that fits is {shown(fits)}"
        )
    # One correct rounding, with room for the float64 arithmetic that measures it.
    if lost.worst > form.roundoff * (1 + 2.0**-20) and not round_gains:
        raise ValueError(
            f"{where} cannot hold the gain {shown(edit.factor)}: {lost.inexact} of {lost.numbers} scales fall below what {number} holds exactly "
            f"(relative error up to {lost.worst:.2g}): use a larger gain, or allow rounding"
        )


def _refuse_overlap(model: GgufModel, changed: set[str]) -> None:
    """A header whose tensors share bytes would let one expert's gain reach other weights."""
    previous: StoredTensor | None = None
    for tensor in sorted(model.tensors.values(), key=lambda item: (int(item.shard), item.begin)):
        if previous is not None and previous.shard == tensor.shard and previous.end > tensor.begin:
            if {previous.name, tensor.name} & changed:
                raise ValueError(
                    f"{previous.name} and {tensor.name} share bytes of {model.path(tensor.shard).name}: the tensor table is damaged"
                )
            if previous.end > tensor.end:
                continue
        previous = tensor
