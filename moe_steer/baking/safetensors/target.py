"""Which files the baked folder will have, which text changes its index and config need, and the overlay.

An overlay is a shard of its own for tensors that are changed or new. Changes to
the text of a JSON file are small, and can be taken back to the letter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_steer.baking.edits import Change, NewTensor
from moe_steer.baking.folder_files import read_text, write_at
from moe_steer.baking.record import Patch
from moe_steer.baking.safetensors.biases import with_biases
from moe_steer.baking.safetensors.folder import SINGLE_FILE, Checkpoint

NEW_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SINGLE_AS_FIRST = "model-00001-of-00002.safetensors"
"""The name of a single file that has an overlay: under its own name engines would load it alone."""

_NAMES = ("model-steered{}.safetensors", "steered{}.safetensors", "zz-steered{}.safetensors")


@dataclass(frozen=True, kw_only=True)
class TargetLayout:
    """The shards of the baked folder.

    ``names``: source shard -> its name in the target. ``rewritten``: source shard -> changes made in it. ``extra``: name of the
    shard that holds ``extra_changes`` and ``created``, None when there is nothing for it. ``patches``: file -> changes of its text.
    ``index_text``: the index of a checkpoint that had none.
    """

    names: dict[str, str]
    rewritten: dict[str, list[Change]]
    extra: str | None
    extra_changes: tuple[Change, ...]
    created: tuple[NewTensor, ...]
    patches: dict[str, list[Patch]]
    index_text: str | None


def target_layout(
    source: Checkpoint, changes: Sequence[Change], created: Sequence[NewTensor], overlay: bool
) -> TargetLayout:
    """Lay the target out: with ``overlay`` every change goes into the extra shard, else into its own."""
    extra_changes = tuple(changes) if overlay else ()
    rewritten: dict[str, list[Change]] = {}
    for change in () if overlay else changes:
        rewritten.setdefault(change.tensor.shard, []).append(change)
    replaced = {change.tensor.shard for change in extra_changes}
    extra = overlay_name(source, replaced) if extra_changes or created else None
    names = {shard: kept_name(source, shard) if extra else shard for shard in source.shards}
    patches: dict[str, list[Patch]] = {}
    index_text = None
    if created:
        patches[CONFIG] = [with_biases(read_text(source.folder / CONFIG))]
    if extra and source.index:
        patches[source.index] = _index_patches(read_text(source.folder / source.index), extra, extra_changes, created)
    elif extra:
        index_text = _index_text(source, names[SINGLE_FILE], extra, extra_changes, created)
    return TargetLayout(
        names=names,
        rewritten=rewritten,
        extra=extra,
        extra_changes=extra_changes,
        created=tuple(created),
        patches=patches,
        index_text=index_text,
    )


def _index_patches(text: str, extra: str, changes: Sequence[Change], created: Sequence[NewTensor]) -> list[Patch]:
    moves = {change.tensor.name: (change.tensor.shard, extra) for change in changes}
    patches = [_moved(text, name, *shards) for name, shards in moves.items()] + added_entries(
        text, extra, (tensor.name for tensor in created)
    )
    sizes = re.findall(r'"total_size"\s*:\s*\d+', text)
    if created and len(sizes) == 1:
        number = int(sizes[0].rpartition(":")[2])
        grown = sizes[0].removesuffix(str(number)) + str(number + sum(len(tensor.data) for tensor in created))
        patches.append((sizes[0], grown))
    return patches


def _index_text(
    source: Checkpoint, base: str, extra: str, changes: Sequence[Change], created: Sequence[NewTensor]
) -> str:
    weight_map = dict.fromkeys(source.tensors, base)
    weight_map.update({change.tensor.name: extra for change in changes})
    weight_map.update({tensor.name: extra for tensor in created})
    size = sum(tensor.num_bytes for tensor in source.tensors.values()) + sum(len(tensor.data) for tensor in created)
    return (
        json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


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
    """The name of a source's shard when there is an overlay."""
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


def apply_patches(text: str, patches: Iterable[Patch], where: str) -> str:
    """Carry the patches out in order; ValueError when one does not fit."""
    for old, new in patches:
        if text.count(old) != 1:
            raise ValueError(
                f"{where} holds {old[:80]!r} {text.count(old)} times instead of once: it was changed by hand"
            )
        text = text.replace(old, new)
    return text


def keeps_length(patches: Iterable[Patch]) -> bool:
    """Whether every patch puts as many bytes as it takes, so that nothing behind it moves."""
    return all(len(old.encode()) == len(new.encode()) for old, new in patches)


def byte_edits(text: str, patches: Iterable[Patch], where: str) -> list[tuple[int, bytes]]:
    """(offset, bytes) of the patches in the file; ValueError when one does not fit or does not keep its length."""
    data = text.encode()
    edits: list[tuple[int, bytes]] = []
    for old, new in ((old.encode(), new.encode()) for old, new in patches):
        if len(old) != len(new):
            raise ValueError(
                f"{where}: {old[:80]!r} cannot become {new[:80]!r} in place, because they differ in length"
            )
        if data.count(old) != 1:
            raise ValueError(
                f"{where} holds {old[:80]!r} {data.count(old)} times instead of once: it was changed by hand"
            )
        edits.append((data.index(old), new))
    return edits


def reverse_patches(patches: Iterable[Patch]) -> list[Patch]:
    """What takes the patches back."""
    return [(new, old) for old, new in reversed(list(patches))]


def _moved(index_text: str, name: str, old: str, new: str) -> Patch:
    """What moves a tensor from one shard to another in the text of an index."""
    pattern = re.escape(json.dumps(name)) + r"\s*:\s*" + re.escape(json.dumps(old))
    found = re.findall(pattern, index_text)
    if len(found) != 1:
        raise ValueError(f"the index has {len(found)} readable entries of {name}: save the checkpoint again")
    return found[0], found[0].removesuffix(json.dumps(old)) + json.dumps(new)


def added_entries(index_text: str, shard: str, names: Iterable[str]) -> list[Patch]:
    """A patch that adds tensors at the head of an index's weight_map."""
    match = re.search(r'"weight_map"\s*:\s*\{', index_text)
    if match is None or index_text.count(match[0]) != 1:
        raise ValueError("the index has no readable weight_map: save the checkpoint again")
    lines = "".join(f"\n    {json.dumps(name)}: {json.dumps(shard)}," for name in names)
    return [(match[0], match[0] + lines)] if lines else []
