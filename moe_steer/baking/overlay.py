"""A shard of its own for tensors that are changed or new, and its name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from moe_steer.baking.edits import Change
from moe_steer.baking.files import write_at
from moe_steer.baking.residual import NewTensor
from moe_steer.baking.shards import SINGLE_FILE, Checkpoint

SINGLE_AS_FIRST = "model-00001-of-00002.safetensors"
"""What a single file is called beside an overlay: under its own name engines would load it alone."""

_NAMES = ("model-steered{}.safetensors", "steered{}.safetensors", "zz-steered{}.safetensors")


def overlay_name(source: Checkpoint, replaced: Collection[str] = ()) -> str:
    """A file name behind all shards of the source, in plain and in natural order.

    An engine that loads whole files, not by the index, loads them in one of these orders, and the last copy of a tensor stays.
    The name is filled up to the length of the ``replaced`` shards' names, if they have one length: then an entry of the index
    that moves here keeps its length, and the index can be changed in place.
    """
    if source.index is None:
        return "model-00002-of-00002.safetensors"
    lengths = {len(shard.encode()) for shard in replaced}
    filled = [_filled(name, *lengths) for name in _NAMES] if len(lengths) == 1 else []
    for name in [*filter(None, filled), *(name.format("") for name in _NAMES)]:
        if all(name > shard and _natural(name) > _natural(shard) for shard in source.shards):
            return name
    raise ValueError(f"no overlay can come after {max(source.shards)} in the order of names: bake without --overlay")


def _filled(name: str, length: int) -> str:
    """``model-steered-0000.safetensors`` of the given length; '' where the name alone is longer."""
    missing = length - len(name.format(""))
    return name.format("-" * bool(missing) + "0" * (missing - 1)) if missing >= 0 else ""


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def kept_name(source: Checkpoint, shard: str) -> str:
    """The name of a source's shard beside an overlay."""
    return SINGLE_AS_FIRST if source.index is None and shard == SINGLE_FILE else shard


def write_overlay(path: Path, source: Checkpoint, changes: Sequence[Change], created: Sequence[NewTensor]) -> int:
    """Write the shard, tensors in the order given; returns its size in bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size in _contents(changes, created):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        write_at(file.fileno(), len(text).to_bytes(8, "little") + text, 0)
        at = 8 + len(text)
        for piece in _data(source, changes, created):
            write_at(file.fileno(), piece, at)
            at += len(piece)
        os.fsync(file.fileno())
    return at


def _contents(
    changes: Iterable[Change], created: Iterable[NewTensor]
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    for change in changes:
        yield change.tensor.name, change.tensor.dtype, change.tensor.shape, change.tensor.num_bytes
    for tensor in created:
        yield tensor.name, tensor.dtype, tensor.shape, len(tensor.data)


def _data(source: Checkpoint, changes: Iterable[Change], created: Iterable[NewTensor]) -> Iterator[bytes]:
    for change in changes:
        for _, piece in change.pieces(source):
            yield piece
    for tensor in created:
        yield tensor.data
