"""``Direction``: one vector with its history, as one safetensors file that a steering plan can name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from moe_steer.files import HeadedKind, load_headed, write_whole
from moe_steer.residual_files import HEADER_KEY

VERSION = 1
_KIND = HeadedKind(
    key=HEADER_KEY,
    version=VERSION,
    noun="direction",
    content="direction",
    command="moe-steer direction",
    again="make the direction again",
)
_PLACE = ("version", "layer", "site", "method")


class DirectionWarning(UserWarning):
    """A direction that is not what its settings suggest, such as a selection that selects everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """``vector_D``: float32. Added to the residual stream at the output of decoder layer ``layer``; a strength > 0
    moves towards the positive side of its contrast. ``method``: how it was made. ``header``: JSON values, see
    ``moe_steer.directions.methods``."""

    vector_D: Tensor
    layer: int
    method: str
    site: str = "residual"
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector_D", self.vector_D.detach().to("cpu", torch.float32).contiguous())
        if self.vector_D.ndim != 1 or not bool(torch.isfinite(self.vector_D).all()):
            raise ValueError(
                f"a direction of shape {tuple(self.vector_D.shape)} for layer {self.layer}: give one finite vector [D]"
            )
        if type(self.layer) is not int or self.layer < 0:
            raise ValueError(f"layer of a direction is {self.layer!r}: give a whole number >= 0")
        taken = sorted(set(self.header) & set(_PLACE))
        if taken:
            raise ValueError(f"the header of a direction may not hold {taken[0]!r}: that is a field of its own")

    @property
    def norm(self) -> float:
        """Length of the vector as it is written."""
        return float(self.vector_D.double().norm())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one tensor ``vector`` and the header: aside first, then renamed, so that no reader sees half a file."""
        head = {"version": VERSION, "layer": self.layer, "site": self.site, "method": self.method, **self.header}
        content = save(
            {"vector": self.vector_D}, metadata={HEADER_KEY: json.dumps(head, sort_keys=True, allow_nan=False)}
        )
        write_whole(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Read a file of ``save``; ValueError in one line says what is wrong with it."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Direction:
            rest = {key: value for key, value in header.items() if key not in _PLACE}
            place = {key: header[key] for key in ("layer", "site", "method")}
            return cls(vector_D=tensors["vector"], header=rest, **place)

        return load_headed(path, _KIND, {"vector"}, build)
