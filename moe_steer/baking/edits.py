"""Changes to the bytes of stored tensors: what they are, how they are carried out, how they are written down.

A container is a model's files of weights, opened by their headers alone. It answers which tensors there are, where their
bytes lie, and how its number formats scale; everything else in this package works on any container.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_steer.baking import folder_files
from moe_steer.baking.folder_files import copy_file, write_at
from moe_steer.baking.numbers import Rounding, exponent_of, shift_exponents
from moe_steer.json_files import record_of

Operation = Literal["multiply", "divide", "exponent", "replace"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the data of a tensor, or of one expert's part of it, is: bytes ``begin`` to ``end`` of the file ``shard``."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class Container(ABC):
    """A model's files of weights. ``paths``: shard -> its file."""

    paths: Mapping[str, Path]
    tensors: Mapping[str, StoredTensor]

    @abstractmethod
    def scale(self, piece: bytes, dtype: str, factor: float, divide: bool) -> tuple[bytes, Rounding]:
        """The piece with its numbers (or the scales of its blocks) times ``factor``, or divided by it."""

    def step(self, dtype: str) -> int:
        """How many bytes of a tensor are read at once: a whole number of blocks."""
        return folder_files.PIECE

    @property
    def shards(self) -> tuple[str, ...]:
        """The files of weights."""
        return tuple(self.paths)

    def path(self, name: str) -> Path:
        """The path of one of the model's files."""
        return self.paths[name]

    def pieces(self, tensor: StoredTensor, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(offset in the tensor, bytes) of the range [begin, end) of its data, some MiB at a time."""
        stop, step = tensor.num_bytes if end is None else end, self.step(tensor.dtype)
        with open(self.path(tensor.shard), "rb") as file:
            file.seek(tensor.begin + begin)
            while begin < stop:
                wanted = min(step, stop - begin)
                piece = file.read(wanted)
                if len(piece) < wanted:
                    raise ValueError(f"{self.path(tensor.shard)} ends inside {tensor.name}: fetch the file again")
                yield begin, piece
                begin += len(piece)

    def sha256(self, tensor: StoredTensor) -> str:
        """Hash of a tensor's data."""
        return _sha256(piece for _, piece in self.pieces(tensor))


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One run of bytes [begin, end) of a tensor, and what happens to it.

    multiply, divide: its numbers by ``factor``. exponent: its E8M0 bytes times ``factor``, a power of two. replace: ``old``
    becomes ``new``. ``layer`` and ``expert`` say for which entry of the plan (no expert: a residual vector).
    """

    operation: Operation
    begin: int
    end: int
    layer: int
    expert: int | None = None
    factor: float = 1.0
    old: bytes = b""
    new: bytes = b""

    def apply(self, source: Container, piece: bytes, dtype: str, offset: int) -> tuple[bytes, Rounding]:
        """The changed bytes of a piece that starts ``offset`` bytes after ``begin``."""
        if self.operation == "replace":
            return self.new[offset : offset + len(piece)], Rounding()
        if self.operation == "exponent":
            return shift_exponents(piece, exponent_of(self.factor))
        return source.scale(piece, dtype, self.factor, self.operation == "divide")

    def inverse(self) -> Edit:
        """What undoes it, up to rounding; a factor of 0 has no inverse."""
        common: Any = {"begin": self.begin, "end": self.end, "layer": self.layer, "expert": self.expert}
        if self.operation == "replace":
            return Edit(operation="replace", old=self.new, new=self.old, **common)
        if self.operation == "exponent":
            return Edit(operation="exponent", factor=1 / self.factor, **common)
        swapped: Operation = "multiply" if self.operation == "divide" else "divide"
        return Edit(operation=swapped, factor=self.factor, **common)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; bytes as base64."""
        values = {key: getattr(self, key) for key in ("operation", "begin", "end", "layer", "expert")}
        if self.operation != "replace":
            return {**values, "factor": self.factor}
        return {**values, "old": base64.b64encode(self.old).decode(), "new": base64.b64encode(self.new).decode()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """The inverse of ``to_dict``."""
        raw = {key: base64.b64decode(data[key]) for key in ("old", "new") if key in data}
        edit: Edit = record_of(cls, data, "edits", **raw)
        if not 0 <= edit.begin <= edit.end or not math.isfinite(edit.factor):
            raise ValueError(f"edits: bytes {edit.begin} to {edit.end} times {edit.factor}: no bake writes that")
        return edit


@dataclass(frozen=True, kw_only=True)
class Change:
    """All edits of one tensor, its hash before them ('' where it is not needed), and what rounding loses."""

    tensor: StoredTensor
    edits: tuple[Edit, ...]
    before: str = ""
    lost: Rounding = field(default_factory=Rounding)

    def pieces(self, source: Container) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the whole tensor after the edits, in order."""
        at = 0
        for edit in sorted(self.edits, key=lambda item: item.begin):
            yield from source.pieces(self.tensor, at, edit.begin)
            yield from self.edited(source, edit)
            at = edit.end
        yield from source.pieces(self.tensor, at)

    @property
    def source_shard(self) -> str:
        """The file of the source that holds the tensor."""
        return self.tensor.shard

    def edited(self, source: Container, edit: Edit) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of one edit's run alone."""
        for offset, piece in source.pieces(self.tensor, edit.begin, edit.end):
            yield offset, edit.apply(source, piece, self.tensor.dtype, offset - edit.begin)[0]

    def sha256(self, source: Container) -> str:
        """Hash of the tensor after the edits."""
        return _sha256(piece for _, piece in self.pieces(source))


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the source does not have. The fields that it shares with ``Change`` are empty."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    edits: tuple[Edit, ...] = ()
    before: None = None
    source_shard: None = None
    lost: None = None

    def sha256(self, source: Container) -> str:
        """Hash of the data."""
        return hashlib.sha256(self.data).hexdigest()


def measure(source: Container, tensor: StoredTensor, edit: Edit) -> Rounding:
    """What the edit would lose; reads its run and writes nothing."""
    total = Rounding()
    for offset, piece in source.pieces(tensor, edit.begin, edit.end):
        total = total + edit.apply(source, piece, tensor.dtype, offset - edit.begin)[1]
    return total


def write_changed(source: Container, shard: str, changes: Sequence[Change], path: Path) -> int:
    """A copy of a shard with the edits of ``changes``, on the disk; returns the bytes written for it."""
    size = copy_file(source.path(shard), path)
    with open(path, "r+b") as file:
        for change in changes:
            for edit in change.edits:
                for offset, piece in change.edited(source, edit):
                    write_at(file.fileno(), piece, change.tensor.begin + offset)
                    size += len(piece)
        os.fsync(file.fileno())
    return size


def _sha256(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
