"""Where a checkpoint takes entries of a plan as biases: a say in the choice of experts, and residual vectors.

Of the choice: the bias of a router, where it means exactly that. DeepSeek-V3's correction bias and its kin decide the choice alone, and the
weights come from the scores without it. There an expert with a bias below all scores is never chosen, and one with a bias above all scores
always, with the weight of its own score; where groups are chosen first, such a bias would choose its group as well, so forcing in is
refused. gpt-oss has a bias on its logits and a softmax over the k chosen: there forcing out and a bias on a logit are exact.

Residual vectors: where an architecture ends a layer with ``residual + linear(x) + bias``, a vector added at the layer's output at every
token is a bias. Such places are few: the MLP's last projection in Llama, SmolLM3, Seed-OSS and Nemotron with ``mlp_bias``, GPT-NeoX, Phi
and StarCoder2. Llama, SmolLM3 and Seed-OSS checkpoints without biases get them (zero elsewhere) and ``mlp_bias: true`` in config.json.
Layers that end in a norm (Gemma, OLMo-2), scale their branch (Granite) or route (any mixture of experts) have no such place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from moe_steer.baking.edits import Edit, NewTensor, StoredTensor
from moe_steer.baking.numbers import ROUNDOFF, Rounding, add_floats, decode, encode
from moe_steer.baking.planning import STEER_INSTEAD, EntryCertificate, Work
from moe_steer.baking.safetensors.folder import Checkpoint, CheckpointShape, text_section
from moe_steer.plan import ExpertGain, ResidualVector, SteeringPlan

_FOR_CHOICE = r"(?:[\w.]+\.)?(?:e_score_correction_bias|expert_bias|router_bias)|ffn\.gate\.bias"
_ALSO_FOR_CHOICE = {"inkling2_text": r"|mlp\.gate\.bias", "inkling2_loop_text": r"|mlp\.gate\.bias"}
"""Names that say nothing by themselves: elsewhere a gate's bias may be on the logits."""
_ON_LOGITS = {"gpt_oss": r"mlp\.router\.bias"}
_GROUPED = frozenset(
    [
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note_text",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "glm5_next_text",
        "glm_moe_dsa",
        "hy_v4",
        "hy_v4_vl_text",
        "kimi_k2",
        "kimi_linear",
        "mimo_v2_flash",
        "nemotron_h",
        "sarvam_mla",
        "sarvam_moe",
        "solar_open",
    ]
)
"""Families that choose groups first; a config.json that leaves its numbers out means the library's, which are not known here."""
_GROUP_KEYS = ("n_group", "num_expert_group")
_BEYOND = {"F16": 32752.0}
_TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k")
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


def plan_choice(source: Checkpoint, shape: CheckpointShape, plan: SteeringPlan, work: Work) -> None:
    """Take the entries that act on the choice into ``work``; ValueError, saying why, for one that no bias can mean."""
    entries = [entry for entry in plan.experts if entry.acts_on_choice]
    for layer in sorted({entry.layer for entry in entries}):
        here = [entry for entry in entries if entry.layer == layer]
        place, on_logits = _bias_of(source, shape, here[0])
        for entry in here:
            _refuse(entry, source.config, on_logits)
        if not on_logits:
            _refuse_empty_groups(here, source.config, shape)
        for entry in here:
            _edit_choice(source, place, shape.num_experts, entry, work)


def _bias_of(source: Checkpoint, shape: CheckpointShape, entry: ExpertGain) -> tuple[StoredTensor, bool]:
    """The layer's bias, and whether it is on the logits."""
    logits, also = _ON_LOGITS.get(shape.text_type), _ALSO_FOR_CHOICE.get(shape.text_type, "")
    pattern = re.compile(rf"(?:[A-Za-z_]\w*\.)*?(?:layers|blocks)\.{entry.layer}\.(?:{logits or _FOR_CHOICE + also})")
    found = [
        tensor
        for name, tensor in source.tensors.items()
        if pattern.fullmatch(name) and prod(tensor.shape) == shape.num_experts and "vision" not in name
    ]
    what = f"layer {entry.layer} expert {entry.expert} {entry.action}"
    if not shape.is_verified or len(found) != 1 or found[0].dtype not in ROUNDOFF:
        why = "has no bias that decides which experts are chosen" if shape.is_verified else "is of an unknown family"
        raise ValueError(f"{what} cannot be baked: the router of {shape.model_type} {why}; {STEER_INSTEAD}")
    return found[0], logits is not None


def _refuse(entry: ExpertGain, config: Mapping[str, Any], on_logits: bool) -> None:
    why = ""
    if entry.logit_bias and not on_logits:
        why = "the router's bias decides the choice alone, and a bias on the logit moves the weight as well"
    elif entry.force == "in" and on_logits:
        why = "a bias that forces it in would give it all the weight"
    elif entry.force == "in" and _groups(config)[0] > 1:
        why = "a bias that forces it in would choose its group as well, and other experts with it"
    if why:
        raise ValueError(
            f"layer {entry.layer} expert {entry.expert} {entry.action} cannot be baked: {why}; {STEER_INSTEAD}"
        )


def _groups(config: Mapping[str, Any]) -> tuple[int, int]:
    """(groups, groups that are kept); ValueError where config.json does not say them."""
    text = text_section(config)
    key = next((key for key in _GROUP_KEYS if key in text), None)
    if text.get("model_type") in _GROUPED and (key is None or "topk_group" not in text):
        raise ValueError(
            f"config.json lacks n_group or topk_group, so what a bias does to the choice is not known: write them there, or {STEER_INSTEAD}"
        )
    return (text[key] or 1 if key else 1), text.get("topk_group") or 1


def _refuse_empty_groups(entries: Sequence[ExpertGain], config: Mapping[str, Any], shape: CheckpointShape) -> None:
    """ValueError where a token may find fewer experts than it needs: among masked ones a bias decides nothing."""
    text = text_section(config)
    k = next((text[key] for key in _TOP_K_KEYS if isinstance(text.get(key), int)), 0)
    groups, kept = _groups(config)
    size = shape.num_experts // groups
    left = [size] * groups
    for entry in entries:
        if entry.force == "out":
            left[entry.expert // size] -= 1
    if not k:
        raise ValueError(
            f"config.json does not say how many experts a token has ({_TOP_K_KEYS[0]}): write it there, or {STEER_INSTEAD}"
        )
    if sum(sorted(left)[:kept]) < k or (groups > 1 and min(left) < 2):
        raise ValueError(
            f"layer {entries[0].layer}: with these experts forced out, {kept} of {groups} groups may hold fewer than a token needs, which no bias means exactly; force out fewer, or {STEER_INSTEAD}"
        )


def _edit_choice(source: Checkpoint, tensor: StoredTensor, num_experts: int, entry: ExpertGain, work: Work) -> None:
    size = tensor.num_bytes // num_experts
    begin = entry.expert * size
    old = b"".join(piece for _, piece in source.pieces(tensor, begin, begin + size))
    if entry.force:
        value = _BEYOND.get(tensor.dtype, 1e30) * (1 if entry.force == "in" else -1)
        new, lost = encode(np.array([value]), tensor.dtype), Rounding()
    else:
        new, lost = add_floats(old, tensor.dtype, np.array([entry.logit_bias]))
    if not np.isfinite(decode(new, tensor.dtype)).all():
        raise ValueError(f"{entry.action} takes {tensor.name} out of the range of {tensor.dtype}: give a smaller bias")
    edit = Edit(
        operation="replace", begin=begin, end=begin + size, layer=entry.layer, expert=entry.expert, old=old, new=new
    )
    work.add(tensor, edit, lost)
    work.entries.append(
        EntryCertificate(
            layer=entry.layer,
            expert=entry.expert,
            gain=entry.gain,
            applied=entry.gain,
            verdict="rounded",  # the k chosen may be added up in another order
            bound=max(ROUNDOFF["F32"], ROUNDOFF[tensor.dtype] if lost.inexact else 0.0, lost.worst),
            worst=lost.worst,
            rms=lost.rms,
            format=f"{entry.action.removesuffix(f' x{entry.gain:g}')}, by the router's bias in {tensor.dtype}",
            tensors=(tensor.name,),
            reversible=True,
        )
    )


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
        lost = {
            layer: _edit_bias(source, names[layer], layer, vector_D, work) for layer, vector_D in vectors_LD.items()
        }
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


def _edit_bias(
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
