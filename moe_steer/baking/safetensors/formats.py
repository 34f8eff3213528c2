"""Which part of a stored down projection scales its output: one entry a number format, quantised ones included.

Sources: the layouts are those of DeepSeek-V3 (weight_scale_inv), compressed-tensors, ModelOpt, GPTQ and AWQ, gpt-oss (MXFP4)
and Mistral (qscale_weight) as their loaders in transformers and vLLM read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moe_steer.baking.edits import Operation
from moe_steer.baking.numbers import ROUNDOFF
from moe_steer.baking.safetensors.layouts import Parts

_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = frozenset({"U8", "I8", "I32", "F4"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
_INPUT = frozenset({"input_scale", "activation_scale", "input_zero_point", "input_global_scale", "qscale_act"})


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


_GPTQ = frozenset({"qzeros", "g_idx"})
_INTEGERS = _INPUT | {"weight_shape", "weight_zero_point", "weight_g_idx"}
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
