"""An entry on the residual stream: a vector, and what is done with it. And whether it fits a model."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.direction import SITE, Direction, VectorFile
from moe_steer.entries.expert_entry import check_finite, check_index
from moe_steer.gates.conditions import When
from moe_steer.json_files import is_number, quoted
from moe_steer.tokens import parse_scope

if TYPE_CHECKING:
    from torch import Tensor

    from moe_steer.entries.transform import Transform
    from moe_steer.layers import ModelShape

UNITS = ("vector", "residual_norm")
DEEDS = ("add", "clamp", "set", "ablate", "rotate")
"""What is done with a vector: see ``moe_steer.entries.transform``."""
ENTRY_SITES = ("output", "attention", "head", "mlp")
"""Output of the layer; output of its attention module (before a norm that some families put behind it); one head of it, in the input
of the output projection; output of its MLP or mixture of experts."""


@dataclass(frozen=True, slots=True)
class ResidualVector:
    """Add a multiple of a vector to the residual stream at the output of one decoder layer, or do something else with it, or elsewhere
    in the layer.

    The vector comes from ``file`` or from memory. ``file``: a safetensors file that holds one tensor ``vector`` of shape [D]; a
    relative path is taken from the folder of the plan file. ``vector``: a tensor [D] or a ``Direction``; it is copied.
    ``scope`` says at which tokens. ``unit`` says what ``strength`` counts: ``vector`` adds strength x vector as it is;
    ``residual_norm`` adds strength x residual_norm x vector / |vector|, where residual_norm is the mean norm of the residual
    stream at that layer, which the header of the file or of the ``Direction`` must hold. ``when``: at which tokens of the scope the
    entry acts, on a ramp with a part of what it adds (``moe_steer.gates.conditions``). ``do``, with ``low``, ``high`` and ``to``: what is
    done with the vector (``moe_steer.entries.transform``). ``site``: ``output`` of the layer, ``attention`` (the output of its attention),
    ``head`` (of that, number ``head``, in the input of the output projection; the vector has the head's width) or ``mlp`` (the output of
    its MLP or experts).
    """

    layer: int
    file: str = ""
    strength: float = 1.0
    scope: str = "all"
    unit: str = "vector"
    vector: Tensor | Direction | VectorFile | None = None
    when: When | None = None
    do: str = "add"
    low: float | None = None
    high: float | None = None
    to: float | None = None
    site: str = "output"
    head: int | None = None

    def __post_init__(self) -> None:
        check_index("layer", self.layer, self)
        if not isinstance(self.file, str) or not (self.file or self.vector is not None):
            raise ValueError(
                f"file of the residual vector at layer {self.layer} is {quoted(self.file)}: give the path of a safetensors file, or a vector"
            )
        check_finite(f"strength of the residual vector at layer {self.layer}", self.strength)
        parse_scope(self.scope)
        if self.when is not None:
            object.__setattr__(self, "when", When.of(self.when))
        if self.unit not in UNITS:
            raise ValueError(
                f"unit of the residual vector at layer {self.layer} is {quoted(self.unit)}: choose one of {', '.join(UNITS)}"
            )
        self._check_transform()
        if self.vector is not None:
            if self.file:
                raise ValueError(
                    f"the residual vector at layer {self.layer} has both a vector and the file {self.file!r}: give one of them"
                )
            copy = self.vector if isinstance(self.vector, VectorFile) else VectorFile.of(self.vector)
            object.__setattr__(self, "vector", copy)
            self.check_place(copy, self.name)

    def _check_transform(self) -> None:
        where = f"the residual vector at layer {self.layer}"
        for key, value, known in (("do", self.do, DEEDS), ("site", self.site, ENTRY_SITES)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{key} of {where} is {quoted(value)}: choose one of {', '.join(known)}")
        wanted = {"clamp": ("low", "high"), "set": ("to",)}.get(self.do, ())
        given = [key for key in ("low", "high", "to") if getattr(self, key) is not None]
        for key in given:
            check_finite(f"{key} of {where}", getattr(self, key))
            if key not in wanted:
                raise ValueError(f"{where} is to {self.do} and has {key!r}, which nothing reads: leave it out")
        if wanted and not given:
            raise ValueError(f"{where} is to {self.do}: give {' or '.join(wanted)}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low of {where} is {self.low:g}, above high, {self.high:g}: give a range")
        if self.do in ("ablate", "rotate") and self.unit != UNITS[0]:
            raise ValueError(f"{where} is to {self.do}, which needs no unit: leave 'unit' out")
        if (self.site == "head") != (self.head is not None):
            raise ValueError(
                f"site of {where} is {self.site!r} and head {quoted(self.head)}: give both for a head, or neither"
            )
        if self.head is not None:
            check_index("head", self.head, self)

    @property
    def acts_inside(self) -> bool:
        """Whether it acts before the layer's output is there."""
        return self.site != "output"

    @property
    def only_adds(self) -> bool:
        """Whether it adds a vector at the layer's output, which is all that version 1 of plans knows."""
        return self.do == "add" and not self.acts_inside

    @property
    def name(self) -> str:
        """The file as the plan names it; what a vector in memory is called instead."""
        return self.file or f"the vector at layer {self.layer}"

    def audit_row(self) -> dict[str, Any]:
        """What the entry is, as an audit says it: also of a vector in memory."""
        said = {name: getattr(self, name) for name in ("strength", "unit", "scope")}
        return {"kind": "residual", "layer": self.layer, "file": self.name, **said, **self._more()}

    def _more(self) -> dict[str, Any]:
        """What is not as by default of the keys that version 1 of plans does not have, gates apart."""
        values = {
            "do": self.do,
            "low": self.low,
            "high": self.high,
            "to": self.to,
            "site": self.site,
            "head": self.head,
        }
        return {key: value for key, value in values.items() if value is not None and value not in ("add", "output")}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ValueError for a vector in memory."""
        if not self.file:
            raise ValueError(
                f"{self.name} is in memory, and a plan in JSON names files: write both with SteeringPlan.save"
            )
        values = {name: getattr(self, name) for name in ("layer", "file", "strength", "scope", "unit")} | self._more()
        return values if self.when is None else {**values, "when": self.when.to_dict()}

    def identity(self, found: VectorFile) -> dict[str, Any]:
        """What the entry does, with the content of its file in place of the name, and without what is as by default."""
        values: dict[str, Any] = {"layer": self.layer, "strength": self.strength, "scope": self.scope}
        if self.unit != UNITS[0]:
            values["unit"] = self.unit
        values |= self._more()
        if self.when is not None:
            values["when"] = self.when.to_dict()
        return {**values, "sha256": hashlib.sha256(found.content).hexdigest()}

    def check_place(self, found: VectorFile, where: str) -> None:
        """ValueError where the header of the vector, which ``where`` names, says another layer or site."""
        layer, site = found.header.get("layer"), found.header.get("site")
        if layer is not None and layer != self.layer:
            raise ValueError(
                f"{where} was made for layer {quoted(layer)} and the plan adds it at layer {self.layer}: name layer {quoted(layer)} in the plan, or make a direction for layer {self.layer}"
            )
        if site is not None and site != ("head" if self.site == "head" else SITE):
            raise ValueError(
                f"{where} was made for site {quoted(site)} and a plan adds vectors at site {SITE!r} (the output of a decoder layer){', or at heads' if self.site == 'head' else ''}: make the direction again at that site"
            )

    def check(self, found: VectorFile, shape: ModelShape) -> None:
        """ValueError where the vector was made on another model, or has another width."""
        made_for = found.header.get("model")
        what = f"the vector {self.file!r}" if self.file else self.name
        for key in ("model_type", "num_layers"):
            wanted = made_for.get(key) if isinstance(made_for, dict) else None
            if wanted is not None and wanted != getattr(shape, key):
                raise ValueError(
                    f"{what} was made on a model with {key} {quoted(wanted)}, this one has {getattr(shape, key)!r}: give that model, or make a direction on this one with 'moe-steer direction'"
                )
        width = len(found.vector_D)
        if self.site != "head" and width != shape.hidden_size:
            raise ValueError(
                f"{what} has width {width}, the model's residual stream has {shape.hidden_size}: make a direction on this model with 'moe-steer direction'"
            )

    def shift_of(self, found: VectorFile, where: str) -> Tensor:
        """float64 [D]: what an entry that adds adds to a token, its strength and unit counted in. ValueError for a vector of zeros, and
        for a header that does not say what the unit needs."""
        length = self._length(found, where)
        if self.unit == "vector":
            return found.vector_D.double() * self.strength
        return found.vector_D.double() * (self.strength * length / float(found.vector_D.double().norm()))

    def transform_of(self, found: VectorFile, where: str) -> Transform:
        """What an entry that does not add does. ValueError as for ``shift_of``."""
        from moe_steer.entries.transform import Transform  # which needs torch, and plans of gains do not

        length = self._length(found, where)
        low, high = {"set": (self.to, self.to), "ablate": (0.0, 0.0)}.get(self.do, (self.low, self.high))
        return Transform(
            self.do,
            found.vector_D.double() / found.vector_D.double().norm(),
            self.strength,
            -math.inf if low is None else low * length,
            math.inf if high is None else high * length,
        )

    def _length(self, found: VectorFile, where: str) -> float:
        """How long a strength, or a bound, of 1 is."""
        length = float(found.vector_D.double().norm())
        if length == 0.0:
            raise ValueError(f"{where} holds a vector of zeros, which has no direction: make the direction again")
        if self.unit == "vector":
            return length
        norm = found.header.get("residual_norm")
        if norm is None:
            raise ValueError(
                f"{where} has no residual_norm in its header, which unit 'residual_norm' needs: use unit 'vector', or make the direction with 'moe-steer direction'"
            )
        if not is_number(norm) or norm <= 0:
            raise ValueError(
                f"{where} says residual_norm is {quoted(norm)}, which is not a length: use unit 'vector', or make the direction again"
            )
        return float(norm)


RESIDUAL_KEYS = ("layer", "file", "strength", "scope", "unit", "when", "do", "low", "high", "to", "site", "head")
"""What an entry may hold in a plan file."""


def read_vector(path: Path, entry: ResidualVector) -> VectorFile:
    """Read the vector of a plan's entry; ValueError when the file holds no finite vector, or one made for another place."""
    found = VectorFile.read(path)
    entry.check_place(found, str(path))
    return found
