"""``Direction``: one vector with its history, as one safetensors file that a steering plan can name. Directions of one place
can be added, subtracted and scaled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.files import HeadedKind, load_headed, read_headed, write_whole
from moe_steer.json_files import check_types, is_number, quoted

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
SITE = "residual"
"""The only site that a plan adds vectors at: the output of a decoder layer."""
_KIND = HeadedKind(
    key="direction",
    version=VERSION,
    noun="direction",
    content="direction",
    command="moe-steer direction",
    again="make the direction again",
)
COMBINED = "combined"
"""The method of a direction that was computed from others."""
_PLACE = ("version", "layer", "site", "method")
_NAME = re.compile(r"\w[^/\\]{0,59}")
"""Of a method: files are named by it, and a file that comes from anywhere must not say where they go."""
_HEADER = {"model": dict | None, "norm": float | None, "residual_norm": float | None, "terms": list[dict] | None}


class DirectionWarning(UserWarning):
    """A direction that is not what its settings suggest, such as a selection that selects everything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """``vector_D``: float32. Added to the residual stream at the output of decoder layer ``layer``; a strength > 0
    moves towards the positive side of its contrast. ``method``: how it was made. ``header``: JSON values, see
    ``moe_steer.directions.methods``.

    ``2 * a - b / 3`` is a direction too: computed in float64, kept in float32. ValueError in one line for different layers,
    sites, widths or models, and for numbers that are not finite. Its method is ``combined``; its header holds ``terms`` (factor,
    method and sha256 of each vector in it), its own ``norm``, its ``model``, and ``residual_norm`` where both sides have the same
    one. Two different ones were measured on different texts and neither holds for the sum: steer with it in unit ``vector``.
    """

    vector_D: Tensor
    layer: int
    method: str
    site: str = SITE
    header: Mapping[str, Any] = field(default_factory=dict)

    __array_ufunc__ = None  # numpy's numbers leave the multiplication to this class

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector_D", self.vector_D.detach().cpu().float().contiguous())
        if self.vector_D.ndim != 1 or not bool(self.vector_D.isfinite().all()):
            raise ValueError(
                f"a direction of shape {tuple(self.vector_D.shape)} for layer {self.layer}: give one finite vector [D]"
            )
        if type(self.layer) is not int or self.layer < 0:
            raise ValueError(f"layer of a direction is {quoted(self.layer)}: give a whole number >= 0")
        if not isinstance(self.method, str) or not (_NAME.fullmatch(self.method) and self.method.isprintable()):
            raise ValueError(
                f"method of a direction is {quoted(self.method)}: give a name of 1 to 60 characters, a letter first and no slash"
            )
        if not isinstance(self.site, str) or not self.site:
            raise ValueError(f"site of a direction is {quoted(self.site)}: give the name of a place, such as {SITE}")
        check_types(dict(self.header), "the header of a direction", _HEADER)
        taken = sorted(set(self.header) & set(_PLACE))
        if taken:
            raise ValueError(f"the header of a direction may not hold {taken[0]!r}: that is a field of its own")

    @property
    def norm(self) -> float:
        """Length of the vector as it is written."""
        return float(self.vector_D.double().norm())

    @property
    def head(self) -> dict[str, Any]:
        """The header as its file holds it."""
        return {"version": VERSION, "layer": self.layer, "site": self.site, "method": self.method, **self.header}

    def to_bytes(self) -> bytes:
        """The content of its file: one tensor ``vector``, and the header."""
        from safetensors.torch import save

        return save({"vector": self.vector_D}, {_KIND.key: json.dumps(self.head, sort_keys=True, allow_nan=False)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: aside first, then renamed, so that no reader sees half a file."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Read a file of ``save``; ValueError in one line says what is wrong with it."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Direction:
            rest = {key: value for key, value in header.items() if key not in _PLACE}
            place = {key: header[key] for key in ("layer", "site", "method")}
            return cls(vector_D=tensors["vector"], header=rest, **place)

        return load_headed(path, _KIND, {"vector"}, build)

    def __mul__(self, factor: float) -> Direction:
        if not _is_real(factor):
            return NotImplemented
        number = _finite(factor)
        terms = [{**term, "factor": term["factor"] * number} for term in self._terms]
        return self._derived(self.vector_D.double() * number, terms, self.header)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if not _is_real(divisor):
            return NotImplemented
        number = _finite(divisor)
        if number == 0:
            raise ValueError(f"the direction for layer {self.layer} is divided by 0: give another number")
        terms = [{**term, "factor": term["factor"] / number} for term in self._terms]
        return self._derived(self.vector_D.double() / number, terms, self.header)

    def __neg__(self) -> Direction:
        return self * -1

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        _refuse_different(self, other)
        shared = {key: value for key, value in self.header.items() if other.header.get(key) == value}
        mine, theirs = (one.header.get("model") or {} for one in (self, other))
        shared["model"] = {key: value for key, value in {**theirs, **mine}.items() if theirs.get(key, value) == value}
        return self._derived(self.vector_D.double() + other.vector_D.double(), [*self._terms, *other._terms], shared)

    def __sub__(self, other: Direction) -> Direction:
        return self + -other if isinstance(other, Direction) else NotImplemented

    @property
    def _terms(self) -> list[dict[str, Any]]:
        terms = self.header.get("terms")
        if self.method == COMBINED and isinstance(terms, list) and all(is_number(one.get("factor")) for one in terms):
            return terms
        digest = hashlib.sha256(self.vector_D.numpy().tobytes()).hexdigest()
        return [{"factor": 1.0, "method": self.method, "sha256": digest}]

    def _derived(self, vector_D: Tensor, terms: list[dict[str, Any]], header: Mapping[str, Any]) -> Direction:
        """With those parts of a header that hold for the new vector too."""
        kept = {key: header[key] for key in ("model", "residual_norm") if header.get(key)}
        made = Direction(vector_D=vector_D, layer=self.layer, site=self.site, method=COMBINED, header=kept)
        return dataclasses.replace(made, header={**kept, "terms": terms, "norm": made.norm})


def _refuse_different(one: Direction, other: Direction) -> None:
    """ValueError where two directions belong to different places or models. A direction that does not say its model goes with
    any; a model's name does not count, since it is a folder or a hub id."""
    named = [
        {key: value for key, value in (each.header.get("model") or {}).items() if key != "name"}
        for each in (one, other)
    ]
    pairs: list[tuple[str, object, object]] = [
        ("layer", one.layer, other.layer),
        ("site", one.site, other.site),
        ("width", len(one.vector_D), len(other.vector_D)),
    ]
    pairs += [("model", named[0], named[1])] if all(named) else []
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ValueError(
                f"directions of {name} {quoted(mine)} and {quoted(theirs)} cannot be added: give directions of one {name}"
            )


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"a direction is multiplied or divided by {quoted(value)}: give a finite number")
    return number


@dataclass(frozen=True)
class VectorFile:
    """What a steering plan knows of one vector: the content of its file, or of the file that would be written for it. Equal
    where the contents are."""

    content: bytes = field(repr=False)
    vector_D: Tensor = field(compare=False)
    """float32."""
    header: Mapping[str, Any] = field(compare=False)
    """JSON values, empty for a plain vector."""

    @classmethod
    def of(cls, vector: Tensor | Direction) -> VectorFile:
        """A copy of a vector in memory; ValueError for anything but a direction or one finite tensor [D]."""
        if isinstance(vector, Direction):
            return cls(vector.to_bytes(), vector.vector_D.clone(), vector.head)
        from safetensors.torch import save
        from torch import Tensor

        if not isinstance(vector, Tensor) or vector.ndim != 1 or not bool(vector.isfinite().all()):
            what = f"of shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else quoted(vector)
            raise ValueError(f"a vector {what} cannot be added to the residual stream: give one finite tensor [D]")
        vector_D = vector.detach().cpu().float().clone().contiguous()
        return cls(save({"vector": vector_D}), vector_D, {})

    @classmethod
    def read(cls, path: Path) -> VectorFile:
        """A file of ``Direction.save``, or any safetensors file with one tensor [D] named ``vector``, with a header or without.

        ValueError when it holds no finite vector, or anything else, and for a header that this program misreads.
        """
        found = read_headed(path, _KIND.key, _KIND.again, {"vector"})
        vector_D = found.tensors.get("vector")
        if vector_D is None or vector_D.ndim != 1 or len(found.names) > 1 or not vector_D.is_floating_point():
            kind = f" of {str(vector_D.dtype).removeprefix('torch.')}" if vector_D is not None else ""
            raise ValueError(
                f"{path} holds {quoted(found.names)}{kind}: a residual file needs one 1-D tensor named 'vector', of floats"
            )
        vector_D = vector_D.float()
        if not bool(vector_D.isfinite().all()):
            raise ValueError(f"{path} holds NaN or infinite numbers: make the direction again")
        header = found.header or {}
        if (version := header.get("version", VERSION)) != VERSION or type(version) is not int:
            raise ValueError(
                f"{path} has version {quoted(version)}, this program reads version {VERSION}: {_KIND.again}"
            )
        for key in ("norm", "residual_norm"):
            if (norm := header.get(key)) is not None and not (is_number(norm) and norm >= 0):
                raise ValueError(f"{path} says {key} is {quoted(norm)}, which is not a length: {_KIND.again}")
        return cls(path.read_bytes(), vector_D, header)
