"""The entries of a steering plan: a gain on an expert, a vector for the residual stream."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_steer.tokens import parse_scope

UNITS = ("vector", "residual_norm")


@dataclass(frozen=True, slots=True)
class ExpertGain:
    """Multiply the final gate weight of one expert, wherever the router selected it (RICE, arXiv 2505.14681, Eq. 7).

    ``layer`` is the absolute 0-based index among the decoder layers, ``expert`` the global expert id, ``gain`` a finite
    factor >= 0 (0 silences the expert's contribution; the selection itself never changes).
    """

    layer: int
    expert: int
    gain: float

    def __post_init__(self) -> None:
        _check_index("layer", self.layer, self)
        _check_index("expert", self.expert, self)
        if not _is_number(self.gain) or not math.isfinite(self.gain) or self.gain < 0:
            raise ValueError(
                f"gain of layer {self.layer} expert {self.expert} is {self.gain!r}: give a finite number >= 0"
            )
        object.__setattr__(self, "gain", float(self.gain))


@dataclass(frozen=True, slots=True)
class ResidualVector:
    """Add a multiple of a vector to the residual stream at the output of one decoder layer.

    ``file`` is a safetensors file that holds one tensor ``vector`` of shape [D]; a relative path is taken from the
    folder of the plan file. ``scope`` says at which tokens. ``unit`` says what ``strength`` counts: ``vector`` adds strength x
    vector as it stands in the file; ``residual_norm`` adds strength x residual_norm x vector / |vector|, where residual_norm is
    the mean norm of the residual stream at that layer, which the file's header must hold.
    """

    layer: int
    file: str
    strength: float = 1.0
    scope: str = "all"
    unit: str = "vector"

    def __post_init__(self) -> None:
        _check_index("layer", self.layer, self)
        if not isinstance(self.file, str) or not self.file:
            raise ValueError(
                f"file of the residual vector at layer {self.layer} is {self.file!r}: give the path of a safetensors file"
            )
        if not _is_number(self.strength) or not math.isfinite(self.strength):
            raise ValueError(
                f"strength of the residual vector at layer {self.layer} is {self.strength!r}: give a finite number"
            )
        parse_scope(self.scope)
        if self.unit not in UNITS:
            raise ValueError(
                f"unit of the residual vector at layer {self.layer} is {self.unit!r}: choose one of {', '.join(UNITS)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_index(name: str, value: object, owner: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} of {type(owner).__name__} is {value!r}: give a whole number >= 0")
