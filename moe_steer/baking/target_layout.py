"""Which files the baked folder will have, and which text changes its index and config need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_steer.baking.edits import Change
from moe_steer.baking.overlay import kept_name, overlay_name
from moe_steer.baking.residual import NewTensor, with_biases
from moe_steer.baking.shards import SINGLE_FILE, Checkpoint
from moe_steer.baking.textpatch import Patch, added_entries, moved_entries, new_index

NEW_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


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


def read_text(path: Path) -> str:
    """A text file with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def _index_patches(text: str, extra: str, changes: Sequence[Change], created: Sequence[NewTensor]) -> list[Patch]:
    moves = {change.tensor.name: (change.tensor.shard, extra) for change in changes}
    patches = moved_entries(text, moves) + added_entries(text, extra, (tensor.name for tensor in created))
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
    return new_index(weight_map, size)
