"""What a GGUF model holds and where; a model in several parts is read as one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_steer.baking import folder_files
from moe_steer.baking.edits import Container, StoredTensor
from moe_steer.baking.gguf.blocks import BLOCK_FORMATS, rescale
from moe_steer.baking.numbers import Rounding
from moe_steer.gguf import Header, read_header

_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_KEYS = ("block_count", "nextn_predict_layers", "expert_count", "embedding_length")


@dataclass(frozen=True, kw_only=True)
class GgufModel(Container):
    """A GGUF file, or the parts of a model, which are numbered '0', '1', ... whatever the files are called.

    The shape of a tensor is in GGUF order (fastest dimension first). ``header_bytes``: where the tensor data of each part
    begins. ``numbers``: those of its metadata that a plan is checked against.
    """

    header_bytes: Mapping[str, int]
    architecture: str
    name: str | None
    numbers: Mapping[str, int]

    @property
    def first(self) -> Path:
        """The file that is given to an engine."""
        return self.paths["0"]

    def step(self, dtype: str) -> int:
        """A whole number of blocks."""
        block = BLOCK_FORMATS[dtype].num_bytes
        return max(1, folder_files.PIECE // block) * block

    def scale(self, piece: bytes, dtype: str, factor: float, divide: bool) -> tuple[bytes, Rounding]:
        """Blocks with their scales times ``factor``, or divided by it."""
        form = BLOCK_FORMATS[dtype]
        blocks_NB = np.frombuffer(piece, np.uint8).reshape(-1, form.num_bytes)
        new_NB, lost = rescale(blocks_NB, form, factor, divide=divide)
        return new_NB.tobytes(), lost


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model's path is that of a GGUF file: by its name, or because it is a file."""
    return os.fspath(path).endswith(".gguf") or Path(path).is_file()


def read_gguf(path: Path) -> GgufModel:
    """Read the header of a GGUF file and of all its parts; ValueError for whatever is missing, cut short or inconsistent."""
    first = read_header(path)
    paths = _part_paths(path, _number(first, "split.count") or 1, _number(first, "split.no") or 0)
    headers = [first, *map(read_header, paths[1:])]
    architecture = str(first.metadata.get("general.architecture"))
    tensors: dict[str, StoredTensor] = {}
    for part, header in enumerate(headers):
        for item in header.tensors:
            if item.name in tensors:
                raise ValueError(
                    f"{item.name} is in {paths[int(tensors[item.name].shard)].name} and again in {paths[part].name}"
                )
            end = item.offset + item.num_bytes
            tensors[item.name] = StoredTensor(item.name, str(part), item.type_name, item.shape, item.offset, end)
    announced = _number(first, "split.tensors.count")
    if len(paths) > 1 and announced is not None and announced != len(tensors):
        raise ValueError(
            f"{path.name} announces {announced} tensors, its {len(paths)} parts hold {len(tensors)}: fetch the parts again"
        )
    numbers = {key: _number(first, f"{architecture}.{key}") for key in _KEYS}
    name = first.metadata.get("general.name")
    return GgufModel(
        paths={str(part): file for part, file in enumerate(paths)},
        header_bytes={str(part): header.num_bytes for part, header in enumerate(headers)},
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        numbers={key: value for key, value in numbers.items() if value is not None},
        tensors=tensors,
    )


def part_names(name: str, count: int) -> list[str]:
    """File names of a model of ``count`` parts, as llama.cpp looks for them; any name is good for a model of one part."""
    if count == 1:
        return [name]
    match = _PART.match(name)
    stem = match["stem"] if match else name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _part_paths(path: Path, count: int, number: int) -> tuple[Path, ...]:
    if count == 1:
        return (path,)
    names = part_names(path.name, count)
    if number != 0:
        raise ValueError(f"{path} is part {number + 1} of {count}: give the first part, {names[0]!r}")
    if path.name != names[0]:
        raise ValueError(
            f"{path} is the first of {count} parts and has lost its name: the first part must be named like {names[0]!r}"
        )
    paths = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise ValueError(
            f"{path} is the first of {count} parts, and {missing[0]!r} is not in the same folder: fetch all parts"
        )
    return paths


def _number(header: Header, key: str) -> int | None:
    """A whole number of the metadata; None where it is absent or something else."""
    value = header.metadata.get(key)
    return value if isinstance(value, int) else None
