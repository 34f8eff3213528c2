"""Take a bake back: the original checkpoint from the baked one, proven by the hashes that the bake wrote down."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from moe_steer.baking.baker import existing_parent
from moe_steer.baking.edits import Change
from moe_steer.baking.files import (
    Place,
    copy_file,
    data_size,
    hard_link,
    refuse_full_disk,
    symbolic_link,
    write_at,
    write_text,
)
from moe_steer.baking.record import ChangedTensor, Record, read_record
from moe_steer.baking.shards import Checkpoint, open_shard
from moe_steer.baking.staging import refuse_target, staged, staging
from moe_steer.baking.target_layout import read_text
from moe_steer.baking.textpatch import apply_patches, reverse_patches
from moe_steer.baking.verification import BakeMismatch, check_folder


def unbake(
    baked_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, copy: bool = False, symlink: bool = False
) -> Record:
    """Write the checkpoint that was baked into ``out_dir``, bit for bit; returns the record of the bake.

    An overlay still has the original tensors. A rewritten shard is scaled back, which restores powers of two and often nothing
    else; every tensor must have the hash it had before. ValueError names what cannot be restored, before anything is written.
    Files that were left out of the baked folder (weights in other formats) do not come back.
    """
    if copy and symlink:
        raise ValueError("copy and symlink exclude each other: choose one")
    folder, target = Path(baked_dir), Path(out_dir)
    record = read_record(folder)
    refuse_target(target, folder)
    baked = check_folder(folder, record, times_count=False)
    undone = _undone(baked, record)
    place: Place = copy_file if copy else symbolic_link if symlink else hard_link
    copied = [name for name in record.files if name in undone or (copy and name.endswith(".safetensors"))]
    refuse_full_disk(existing_parent(target), sum(data_size(folder / name) for name in copied), folder / "config.json")
    with staging(target) as restored:
        for name, file in record.files.items():
            if file.source is None:
                continue
            path = staged(restored, file.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in undone:
                _restore_shard(baked, undone[name], path)
            elif name in record.patches:
                _restore_text(folder / name, path, record, file.source)
            elif name.endswith(".safetensors"):
                place(folder / name, path)
            else:
                copy_file(folder / name, path)
    return record


def _undone(baked: Checkpoint, record: Record) -> dict[str, list[Change]]:
    """Shard of the baked folder -> what restores its tensors; ValueError when numbers are gone."""
    undone: dict[str, list[Change]] = {}
    for change in record.changes:
        if change.source_shard is None:
            continue
        if record.files[change.shard].source is None:
            _check_original(baked, change, record)
            continue
        back = _inverse(baked, change)
        undone.setdefault(change.shard, []).append(back)
    return undone


def _inverse(baked: Checkpoint, change: ChangedTensor) -> Change:
    silenced = next((edit for edit in change.edits if edit.factor == 0), None)
    if silenced is not None:
        raise ValueError(
            f"{change.name} was silenced (gain 0) and its numbers are gone: take the original checkpoint; an overlay could be taken back"
        )
    edits = tuple(edit.inverse() for edit in change.edits)
    back = Change(tensor=baked.tensors[change.name], edits=edits)
    if back.sha256(baked) != change.sha256_before:
        factors = ", ".join(sorted({f"{edit.factor:g}" for edit in change.edits}))
        raise ValueError(
            f"{change.name} cannot be restored bit for bit: gain {factors} was rounded when it was baked; take the original checkpoint"
        )
    return back


def _check_original(baked: Checkpoint, change: ChangedTensor, record: Record) -> None:
    """The tensor that an overlay hides must still be the original one."""
    name = next(name for name, file in record.files.items() if file.source == change.source_shard)
    shard = open_shard(baked.path(name))
    if shard.sha256(shard.tensors[change.name]) != change.sha256_before:
        raise BakeMismatch(f"{change.name} in {name} is not the original any more: take the original checkpoint")


def _restore_shard(baked: Checkpoint, changes: list[Change], path: Path) -> None:
    copy_file(baked.path(changes[0].tensor.shard), path)
    with open(path, "r+b") as file:
        for change in changes:
            for edit in change.edits:
                for offset, piece in change.edited(baked, edit):
                    write_at(file.fileno(), piece, change.tensor.begin + offset)
        os.fsync(file.fileno())


def _restore_text(source: Path, path: Path, record: Record, name: str) -> None:
    text = apply_patches(read_text(source), reverse_patches(record.patches[source.name]), source.name)
    if hashlib.sha256(text.encode()).hexdigest() != record.source_sha256[name]:
        raise BakeMismatch(f"{source} cannot be taken back to the original {name}: it was changed after baking")
    write_text(path, text)
