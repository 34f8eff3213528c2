"""Checkpoints of safetensors files, read by their headers alone: 8 bytes of length, JSON, data."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.baking.edits import Container, StoredTensor
from moe_steer.baking.folder_files import INDEX_SUFFIX
from moe_steer.baking.numbers import BITS, Rounding, scale_floats

SINGLE_FILE = "model.safetensors"
MAX_HEADER = 100_000_000  # the limit of the format


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
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} holds no JSON object: fetch it again")
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


def read_json(path: Path) -> Any:
    """Parse a JSON file; ValueError names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give the folder of a checkpoint in the transformers format") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name; ValueError when the header or the file's length is wrong."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"{path} is incomplete: {size} bytes cannot hold its header; fetch it again")
            header = json.loads(file.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the shard {path} is missing: fetch the rest of the checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has no readable safetensors header ({error}): fetch it again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has no readable safetensors header: fetch it again")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor(name, path, entry, data) for name, entry in header.items()}
    end = data
    for tensor in sorted(tensors.values(), key=lambda item: (item.begin, item.end)):
        if tensor.begin != end:
            raise ValueError(f"{path}: the data of {tensor.name} does not follow its neighbour's; fetch the file again")
        end = tensor.end
    if end != size:
        raise ValueError(f"{path} has {size} bytes and its header describes {end}: fetch it again")
    return tensors


def _tensor(name: str, path: Path, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = BITS.get(dtype)
        fits = 0 <= begin <= end and (bits is None or math.prod(shape) * bits == (end - begin) * 8)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: the header's entry of {name} contradicts itself; fetch the file again")
    return StoredTensor(name, path.name, dtype, shape, data + begin, data + end)


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
    content = read_json(folder / indices[0])
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / indices[0]} has no weight_map: fetch it again")
    for shard in set(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            name = next(name for name, value in weight_map.items() if str(value) == shard)
            raise ValueError(
                f"{folder / indices[0]} puts {name} into {shard!r}: a safetensors file of the same folder is needed"
            )
    return indices[0], weight_map


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
                f"{index} puts {name} into {shard}, and {found}: the index is wrong; fetch the checkpoint again"
            )
        tensors[name] = tensor
    for shard, header in headers.items():
        for name in header:
            if name not in tensors:
                raise ValueError(
                    f"{shard} holds {name}, which {index} does not list: the index is wrong; fetch the checkpoint again"
                )
    return tensors
