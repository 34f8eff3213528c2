"""Checkpoints of safetensors files, read by their headers alone: 8 bytes of length, JSON, data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.baking.edits import Container, StoredTensor
from moe_steer.baking.folder_files import INDEX_SUFFIX
from moe_steer.baking.numbers import Rounding, scale_floats
from moe_steer.files import read_weight_map, tensor_places
from moe_steer.json_files import read_json, short

SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Container):
    """A folder with config.json and safetensors files. ``index`` is the name of the index, None for a single file.

    ``repeated``: tensors that are in several shards; the index says which one counts, and not every engine asks it.
    """

    folder: Path
    config: Mapping[str, Any]
    index: str | None
    repeated: frozenset[str] = frozenset()

    def path(self, name: str) -> Path:
        """The path of a shard, or of another file of the folder."""
        return self.folder / name

    def scale(self, piece: bytes, dtype: str, factor: float, divide: bool) -> tuple[bytes, Rounding]:
        """Plain numbers times ``factor``, or divided by it."""
        return scale_floats(piece, dtype, factor, divide=divide)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read config, index and every header. ValueError says which file is missing, incomplete or contradicts another."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"there is no model folder {os.fspath(folder)!r}: give a folder with config.json and safetensors"
        )
    missing = f"{path / 'config.json'} is missing: give the folder of a checkpoint in the transformers format"
    types = {"model_type": str | None}
    config = read_json(path / "config.json", "fetch it again", types, missing, endless=True)
    index, weight_map = _weight_map(path)
    shards = tuple(sorted(set(weight_map.values()))) if index else (SINGLE_FILE,)
    headers = {shard: read_header(path / shard) for shard in shards}
    tensors = _by_index(weight_map, headers, index) if index else headers[SINGLE_FILE]
    repeated: frozenset[str] = frozenset()
    if sum(map(len, headers.values())) > len(tensors):
        counts = Counter(name for header in headers.values() for name in header)
        repeated = frozenset(name for name, count in counts.items() if count > 1)
    paths = {shard: path / shard for shard in shards}
    return Checkpoint(folder=path, config=config, index=index, paths=paths, tensors=tensors, repeated=repeated)


def open_shard(path: Path) -> Checkpoint:
    """One safetensors file by itself."""
    return Checkpoint(folder=path.parent, config={}, index=None, paths={path.name: path}, tensors=read_header(path))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name; ValueError when the header or the file's length is wrong."""
    try:
        places = tensor_places(path)
    except FileNotFoundError:
        raise ValueError(f"the shard {path} is missing: fetch the rest of the checkpoint") from None
    except OSError as error:
        raise ValueError(f"the shard {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is incomplete or damaged ({error}): fetch it again") from None
    return {name: StoredTensor(name, path.name, *place) for name, place in places.items()}


def _weight_map(folder: Path) -> tuple[str | None, dict[str, str]]:
    indices = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    single = (folder / SINGLE_FILE).is_file()
    if len(indices) + single > 1:
        raise ValueError(
            f"{folder} holds several checkpoints ({', '.join(indices + [SINGLE_FILE] * single)}): leave one, so that all engines load the same"
        )
    if single:
        return None, {}
    if not indices:
        raise ValueError(
            f"{folder} holds neither {SINGLE_FILE} nor *{INDEX_SUFFIX}: convert the weights to safetensors"
        )
    return indices[0], read_weight_map(folder / indices[0])


def _by_index(
    weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, StoredTensor]], index: str | None
) -> dict[str, StoredTensor]:
    tensors = {}
    for name, shard in weight_map.items():
        tensor = headers[shard].get(name)
        if tensor is None:
            where = next((other for other in headers if name in headers[other]), None)
            found = f"it is in {where}" if where else "no shard has it"
            raise ValueError(
                f"{index} puts {short(name)} into {shard}, and {found}: the index is wrong; fetch the checkpoint again"
            )
        tensors[name] = tensor
    for shard, header in headers.items():
        for name in header:
            if name not in tensors:
                raise ValueError(
                    f"{shard} holds {short(name)}, which {index} does not list: the index is wrong; fetch the checkpoint again"
                )
            if weight_map[name] < shard:  # most engines read the shards in order and keep the last, as an overlay wants
                raise ValueError(
                    f"{shard} holds {short(name)} again, which {index} takes from {weight_map[name]}: the index is wrong; fetch the checkpoint again"
                )
    return tensors
