"""``Direction``: one vector with its history, as one safetensors file that a steering plan can name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

VERSION = 1
KEY = "direction"
_PLACE = ("version", "layer", "site", "method")


class DirectionWarning(UserWarning):
    """A direction that is not what its settings suggest, such as a selection that selects everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """``vector_D``: float32. Added to the residual stream at the output of decoder layer ``layer``; a strength > 0
    moves towards the positive side of its contrast. ``method``: how it was made. ``header``: JSON values, see
    ``moe_steer.directions.finishing``."""

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
        content = save({"vector": self.vector_D}, metadata={KEY: json.dumps(head, sort_keys=True, allow_nan=False)})
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            aside.write_bytes(content)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Read a file of ``save``; ValueError in one line says what is wrong with it."""
        name = os.fspath(path)
        if not Path(path).is_file():
            raise ValueError(f"there is no direction file {name!r}: make one with 'moe-steer direction'")
        try:
            with safe_open(name, framework="pt") as reader:
                metadata = reader.metadata() or {}
                tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is not a whole safetensors file ({error}): make the direction again") from error
        if KEY not in metadata or set(tensors) != {"vector"}:
            raise ValueError(
                f"{name} holds {sorted(tensors)[:6]} and no direction: give a file of 'moe-steer direction'"
            )
        try:
            head = json.loads(metadata[KEY])
            if head.get("version") != VERSION:
                raise ValueError(f"its version is {head.get('version')!r}, this program reads version {VERSION}")
            rest = {key: value for key, value in head.items() if key not in _PLACE}
            return cls(
                vector_D=tensors["vector"], layer=head["layer"], site=head["site"], method=head["method"], header=rest
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{name} cannot be used: {error}") from error
