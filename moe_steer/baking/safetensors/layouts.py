"""Which tensors of a checkpoint hold the output of an expert: the layouts of tensor names, one regular expression each.

Whatever the axes mean after it, the first axis of a fused tensor counts experts, so an expert is one run of bytes in it.

And which part of a stored down projection scales its output: one entry a number format, quantised ones included. Those layouts are
of DeepSeek-V3 (weight_scale_inv), compressed-tensors, ModelOpt, GPTQ and AWQ, gpt-oss (MXFP4) and Mistral (qscale_weight), as their
loaders in transformers and vLLM read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_steer.baking.edits import Operation, StoredTensor
from moe_steer.baking.numbers import ROUNDOFF

Parts = dict[str, StoredTensor]
"""What one down projection consists of, by role: weight, bias, weight_scale_inv, qweight, scales, blocks, ..."""

_LAYER = re.compile(r"(?P<stack>(?:[A-Za-z_]\w*\.)*?(?:layers|blocks|h))\.(?P<layer>\d+)\.(?P<rest>.+)")
_NOT_A_DECODER = ("vision", "visual", "audio", "encoder", "mtp", "nextn")
_BLOCK = r"(?:(?:mlp|block_sparse_moe|ffn|feed_forward|mixer|moe)\.)?"
_DOWN = r"(?:down_projs?|w2|fc2)"
_PER_EXPERT = re.compile(rf"(?P<module>{_BLOCK}experts\.(?P<expert>\d+)\.{_DOWN})\.(?P<role>[\w.]+)")
_FUSED = re.compile(
    rf"(?P<module>{_BLOCK}experts\.{_DOWN}|block_sparse_moe\.output_linear|moe\.down_proj|ffn\.experts\.mlp\.w2)"
    r"(?:[._](?P<role>[\w.]+))?"
)
_NATIVE = re.compile(r"(?:(?:mlp|moe)\.)?router\.per_expert_scale")
_EXPERT_TENSOR = re.compile(_BLOCK + r"experts\.(?P<rest>.+)")
_KNOWN_PROJECTION = re.compile(
    r"(?:\d+\.)?(?:down_projs?|gate_up_projs?|gate_and_up_projs|gate_proj|up_proj|w1|w2|w3|w13|fc1|fc2|mlp\.[vw]\d)(?:[._]|$)"
)
_FUSED_ROLES = {"scale_inv": "weight_scale_inv"}
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = frozenset({"U8", "I8", "I32", "F4"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
_INPUT = frozenset({"input_scale", "activation_scale", "input_zero_point", "input_global_scale", "qscale_act"})
_GPTQ = frozenset({"qzeros", "g_idx"})
_INTEGERS = _INPUT | {"weight_shape", "weight_zero_point", "weight_g_idx"}


@dataclass
class LayerPlaces:
    """The down projections of one layer. ``strange``: other tensors of the experts, which no layout explains."""

    per_expert: dict[int, Parts] = field(default_factory=dict)
    fused: Parts = field(default_factory=dict)
    native_scale: StoredTensor | None = None
    strange: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)

    @property
    def has_experts(self) -> bool:
        """Whether any down projection was found."""
        return bool(self.per_expert or self.fused)

    @property
    def ambiguous(self) -> bool:
        """Whether the names fit two layouts at once, so that an expert's number would not name one tensor."""
        patterns = {re.sub(r"\.\d+\.", ".N.", module) for module in self.modules}
        return len(patterns) > 1


def find_places(tensors: Mapping[str, StoredTensor]) -> tuple[dict[int, LayerPlaces], dict[str, str]]:
    """Layers with experts by number, and stack name -> example for every stack of decoder layers that has experts."""
    layers: dict[int, LayerPlaces] = {}
    stacks: dict[str, str] = {}
    is_decoder: dict[str, bool] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        stack = match["stack"]
        if stack not in is_decoder:
            is_decoder[stack] = not any(part in stack for part in _NOT_A_DECODER)
        if not is_decoder[stack]:
            continue
        found = _sort_in(layers.setdefault(int(match["layer"]), LayerPlaces()), match["rest"], tensor)
        if found:
            stacks.setdefault(stack, name)
    return {layer: places for layer, places in layers.items() if places.has_experts}, stacks


def _sort_in(places: LayerPlaces, rest: str, tensor: StoredTensor) -> bool:
    """Put a tensor where it belongs; True when it is a part of a down projection."""
    match = _PER_EXPERT.fullmatch(rest)
    if match:
        places.per_expert.setdefault(int(match["expert"]), {})[match["role"]] = tensor
        places.modules.add(match["module"])
        return True
    match = _FUSED.fullmatch(rest)
    if match:
        role = match["role"] or "weight"
        places.fused[_FUSED_ROLES.get(role, role)] = tensor
        places.modules.add(match["module"])
        return True
    if _NATIVE.fullmatch(rest):
        places.native_scale = tensor
        return False
    match = _EXPERT_TENSOR.fullmatch(rest)
    if match and not _KNOWN_PROJECTION.match(match["rest"]):
        places.strange.append(tensor.name)
    return False


def count_experts(places: LayerPlaces) -> int | None:
    """How many experts the tensors hold; None when a fused tensor's first axis does not tell."""
    if places.per_expert:
        return max(places.per_expert) + 1
    lengths = {tensor.shape[0] for tensor in places.fused.values() if len(tensor.shape) >= 3}
    return lengths.pop() if len(lengths) == 1 else None


class Format(NamedTuple):
    """``payload`` of a type in ``types`` holds the numbers, ``scale`` what they are multiplied with.

    ``companions``: other parts that may be there and need no change. ``inverse``: the stored scale divides.
    """

    name: str
    payload: str
    types: frozenset[str]
    scale: str
    companions: frozenset[str] = frozenset()
    inverse: bool = False


FORMATS = (
    Format("NVFP4 (ModelOpt)", "weight", _PACKED, "weight_scale_2", _INPUT | {"weight_scale"}),
    Format(
        "NVFP4 (compressed-tensors)", "weight_packed", _PACKED, "weight_global_scale", _INPUT | {"weight_scale"}, True
    ),
    Format("FP8 with block scales", "weight", _FP8, "weight_scale_inv", _INPUT),
    Format("FP8 or INT8 with scales", "weight", _FP8 | {"I8"}, "weight_scale", _INPUT),
    Format("FP8 with scales (Mistral)", "weight", _FP8, "qscale_weight", _INPUT),
    Format("FP8 or FP4 with scales", "weight", _FP8 | _PACKED, "scale", _INPUT),
    Format("packed integers (compressed-tensors)", "weight_packed", _PACKED, "weight_scale", _INTEGERS),
    Format("GPTQ or AWQ", "qweight", frozenset({"I32"}), "scales", _GPTQ),
    Format("MXFP4", "blocks", frozenset({"U8"}), "scales"),
    Format("plain weights", "weight", frozenset(ROUNDOFF), "weight"),
)


@dataclass(frozen=True)
class Placement:
    """What to change in one down projection: the roles of the parts, and how each takes a gain."""

    format: str
    operations: tuple[tuple[str, Operation], ...]

    @property
    def powers_only(self) -> bool:
        """Whether a part holds bare exponents, which take no gain but powers of two."""
        return any(operation == "exponent" for _, operation in self.operations)

    @property
    def is_quantised(self) -> bool:
        """Whether scales carry the gain, not the weights themselves."""
        return self.operations[0][0] != "weight"


def placement(parts: Parts, where: str) -> Placement:
    """How the output of this down projection is scaled; ValueError for a format that is not in the table."""
    for entry in FORMATS:
        if entry.payload not in parts or entry.scale not in parts or parts[entry.payload].dtype not in entry.types:
            continue
        if set(parts) - {entry.payload, entry.scale, "bias"} - entry.companions:
            continue
        kind = parts[entry.scale].dtype
        operation: Operation
        if kind in ROUNDOFF:
            operation = "divide" if entry.inverse else "multiply"
        elif kind in _EXPONENTS and not entry.inverse:
            operation = "exponent"
        else:
            continue
        if "bias" not in parts:
            return Placement(entry.name, ((entry.scale, operation),))
        if parts["bias"].dtype in ROUNDOFF:
            return Placement(entry.name, ((entry.scale, operation), ("bias", "multiply")))
    listed = ", ".join(f"{role} {tensor.dtype}" for role, tensor in sorted(parts.items()))
    raise ValueError(
        f"{where} is stored as {listed}, which is not a known number format: bake the unquantised checkpoint and quantise that"
    )
