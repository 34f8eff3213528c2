"""Which tensors of a checkpoint hold the output of an expert: the layouts of tensor names, one regular expression each.

Whatever the axes mean after it, the first axis of a fused tensor counts experts, so an expert is one run of bytes in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moe_steer.baking.edits import StoredTensor

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


def ranges(numbers: Iterable[int]) -> str:
    """'0-3, 5' for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
