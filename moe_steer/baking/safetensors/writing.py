"""Write a plan into a copy of a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_steer.baking.edits import Change, NewTensor, write_changed
from moe_steer.baking.folder_files import (
    Place,
    copy_file,
    copy_with_edits,
    data_size,
    placing,
    read_text,
    refuse_full_disk,
    sha256_file,
    side_files,
    write_text,
)
from moe_steer.baking.planning import Certificate, Family
from moe_steer.baking.record import RECORD, ChangedTensor, Patch, Record, RecordedFile, has_record, proven, recorded
from moe_steer.baking.safetensors.biases import plan_residual
from moe_steer.baking.safetensors.folder import Checkpoint, open_checkpoint, open_shard
from moe_steer.baking.safetensors.gains import notes, plan_experts
from moe_steer.baking.safetensors.target import (
    NEW_INDEX,
    TargetLayout,
    apply_patches,
    byte_edits,
    keeps_length,
    target_layout,
    write_overlay,
)
from moe_steer.baking.staging import refuse_target, staged, staging
from moe_steer.console import tracked
from moe_steer.plan import SteeringPlan

HASH_LIMIT = 4 << 30
"""Shards that are only linked are hashed too, unless they hold more than this together: 640 GB would take ten minutes."""


def bake_checkpoint(
    folder: str | os.PathLike[str],
    plan: SteeringPlan,
    target: Path,
    *,
    loader: str | None,
    copy: bool,
    symlink: bool,
    round_gains: bool,
    hash_all: bool,
) -> Certificate:
    """As ``bake``, for a folder with config.json and safetensors files."""
    place, made = placing(copy, symlink)
    source = open_checkpoint(folder)
    if has_record(source.folder):
        raise ValueError(f"{source.folder} was baked before ({RECORD}): put both plans into one and bake the original")
    refuse_target(target, source.folder)
    shape, work = plan_experts(source, plan, round_gains)
    created = plan_residual(source, shape, plan, work)
    for tensor in work.edits:
        if tensor.name in source.repeated:
            raise ValueError(
                f"{tensor.name} is in several shards, and engines may load either: save the checkpoint again"
            )
    changes = work.changes(source)
    layout = target_layout(source, changes, created, loader is not None)
    taken, left_out = side_files(source.folder, source.shards)
    other_way = "bake with --overlay, which asks more of the engine"
    refuse_full_disk(target, _needed(source, layout, copy), source.path(source.shards[0]), other_way)
    work.notes += notes(source, shape, work.entries, loader if layout.extra_changes else None, left_out)
    family: Family = "verified" if shape.is_verified else "by structure"
    certificate = replace(work.certificate(shape.model_type, family, created), loader=loader)
    with staging(target) as staged_folder:
        files = _place_shards(source, layout, place, made, staged_folder, hash_all)
        files.update(_write_shards(source, layout, staged_folder))
        files.update(_write_side_files(source, layout, taken, staged_folder))
        written = tuple(sorted(name for name, file in files.items() if "link" not in file.made))
        certificate = replace(
            certificate, files_written=written, bytes_written=sum(files[name].written for name in written)
        )
        record = Record(
            plan=plan,
            plan_digest=plan.digest(),
            certificate=certificate,
            changes=_proven(source, changes, layout, staged_folder),
            files=files,
            patches={name: tuple(patches) for name, patches in layout.patches.items()},
            source_name=source.folder.resolve().name,
            source_sha256={name: sha256_file(source.folder / name) for name in layout.patches},
            left_out=tuple(left_out),
        )
        write_text(staged_folder / RECORD, record.to_text())
    return certificate


def _needed(source: Checkpoint, layout: TargetLayout, copy: bool) -> int:
    copied = source.shards if copy else tuple(layout.rewritten)
    extra = sum(c.tensor.num_bytes for c in layout.extra_changes) + sum(len(t.data) for t in layout.created)
    return sum(data_size(source.path(shard)) for shard in copied) + extra


def _place_shards(
    source: Checkpoint, layout: TargetLayout, place: Place, made: str, folder: Path, hash_all: bool
) -> dict[str, RecordedFile]:
    """Put the unchanged shards where they belong."""
    kept = [shard for shard in source.shards if shard not in layout.rewritten]
    hashed = place is copy_file or hash_all or sum(source.path(shard).stat().st_size for shard in kept) <= HASH_LIMIT
    files = {}
    for shard in tracked(kept, "copying"):
        path = folder / layout.names[shard]
        files[path.name] = recorded(path, made, shard, hashed, place(source.path(shard), path))
    return files


def _write_shards(source: Checkpoint, layout: TargetLayout, folder: Path) -> dict[str, RecordedFile]:
    """Rewrite the shards that hold changed tensors, and write the extra one."""
    files = {}
    for shard, changes in tracked(layout.rewritten.items(), "writing"):
        path = folder / layout.names[shard]
        size = write_changed(source, shard, changes, path)
        files[path.name] = recorded(path, "rewritten", shard, True, size)
    if layout.extra:
        size = write_overlay(folder / layout.extra, source, layout.extra_changes, layout.created)
        files[layout.extra] = recorded(folder / layout.extra, "new", None, True, size)
    return files


def _write_side_files(
    source: Checkpoint, layout: TargetLayout, taken: Sequence[str], folder: Path
) -> dict[str, RecordedFile]:
    """Config, tokenizer, index and the like: as they are, or with their patches."""
    files = {}
    for name in taken:
        path = staged(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in layout.patches:
            size = _write_patched(source.folder / name, path, layout.patches[name])
        else:
            size = copy_file(source.folder / name, path)
        files[name] = recorded(path, "patched" if name in layout.patches else "copied", name, True, size)
    if layout.index_text is not None:
        size = write_text(folder / NEW_INDEX, layout.index_text)
        files[NEW_INDEX] = recorded(folder / NEW_INDEX, "new", None, True, size)
    return files


def _write_patched(source: Path, target: Path, patches: Sequence[Patch]) -> int:
    """The source's text with its patches: changed in a copy where nothing moves, else written anew; the bytes written."""
    text = read_text(source)
    if keeps_length(patches):
        return copy_with_edits(source, target, byte_edits(text, patches, source.name))
    return write_text(target, apply_patches(text, patches, source.name))


def _proven(
    source: Checkpoint, changes: Sequence[Change], layout: TargetLayout, folder: Path
) -> tuple[ChangedTensor, ...]:
    """Every changed and new tensor, read back from the target."""
    places: list[tuple[Change | NewTensor, str | None, str]] = []
    for change in changes:
        home = layout.extra if change in layout.extra_changes else layout.names[change.tensor.shard]
        places.append((change, home, change.tensor.name))
    places += [(tensor, layout.extra, tensor.name) for tensor in layout.created]
    written = {home: open_shard(folder / home) for _, home, _ in places if home}
    found = ((change, written[home], written[home].tensors[name]) for change, home, name in places if home)
    return tuple(proven(source, found))
