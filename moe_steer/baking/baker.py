"""Write a plan into a copy of a checkpoint."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_steer.baking.certificate import Certificate, overall
from moe_steer.baking.edits import Change
from moe_steer.baking.files import (
    Place,
    copy_file,
    copy_with_edits,
    data_size,
    hard_link,
    refuse_full_disk,
    sha256_file,
    side_files,
    symbolic_link,
    write_at,
    write_text,
)
from moe_steer.baking.notes import notes
from moe_steer.baking.overlay import write_overlay
from moe_steer.baking.planning import Work, plan_experts, refuse_plan
from moe_steer.baking.record import RECORD, ChangedTensor, Record, RecordedFile, has_record
from moe_steer.baking.residual import plan_residual
from moe_steer.baking.shards import Checkpoint, open_checkpoint, open_shard
from moe_steer.baking.staging import refuse_target, staged, staging
from moe_steer.baking.target_layout import NEW_INDEX, TargetLayout, read_text, target_layout
from moe_steer.baking.textpatch import Patch, apply_patches, byte_edits, keeps_length
from moe_steer.plan import SteeringPlan

HASH_LIMIT = 4 << 30
"""Shards that are only linked are hashed too, unless they hold more than this together: 640 GB would take ten minutes."""


def bake(
    model_dir: str | os.PathLike[str],
    plan: SteeringPlan,
    out_dir: str | os.PathLike[str],
    overlay: bool = False,
    *,
    copy: bool = False,
    symlink: bool = False,
    round_gains: bool = False,
    hash_all: bool = False,
) -> Certificate:
    """Write ``plan`` into a checkpoint: ``out_dir`` becomes a model folder that any engine serves as it is.

    A gain multiplies what makes the expert's output: its down projection (weights or their scales, and its bias). That equals
    the gain on the gate weight, for the output is weight * projection(x); see the certificate for how exactly.

    ``model_dir``: a folder with config.json and safetensors files; it is only read. ``out_dir`` must not exist, or be empty; it
    appears when all is done, or not at all. ``overlay``: put the changed tensors into a small shard of their own instead of
    rewriting the shards that hold them. Unchanged shards are hard-linked; ``copy`` copies them, ``symlink`` points to them.
    Every copy shares its source's blocks where the file system can (XFS, btrfs), so that only changes are written.
    ``round_gains``: where a format holds only powers of two, take the nearest one. ``hash_all``: hash unchanged shards as well,
    however large. ValueError for plans and checkpoints that cannot be baked, OSError when writing failed; nothing is left then.
    """
    if copy and symlink:
        raise ValueError("copy and symlink exclude each other: choose one")
    refuse_plan(plan)
    source = open_checkpoint(model_dir)
    if has_record(source.folder):
        raise ValueError(f"{source.folder} was baked before ({RECORD}): put both plans into one and bake the original")
    target = Path(out_dir)
    refuse_target(target, source.folder)
    shape, work = plan_experts(source, plan, round_gains)
    created = plan_residual(source, shape, plan, work)
    changes = work.changes(source)
    layout = target_layout(source, changes, created, overlay)
    taken, left_out = side_files(source.folder, source.shards)
    place: Place = copy_file if copy else symbolic_link if symlink else hard_link
    refuse_full_disk(existing_parent(target), _needed(source, layout, copy), source.path(source.shards[0]))
    verdict, bound = overall(work.entries)
    certificate = Certificate(
        verdict=verdict,
        bound=bound,
        model_type=shape.model_type,
        family="verified" if shape.is_verified else "by structure",
        entries=tuple(work.entries),
        notes=tuple(work.notes + notes(source, shape, work.entries, layout.extra, overlay, left_out)),
        overlay=overlay,
        changed_tensors=len(changes) + len(created),
        changed_bytes=_changed_bytes(work) + sum(len(tensor.data) for tensor in created),
    )
    with staging(target) as folder:
        files = _place_shards(source, layout, place, folder, hash_all)
        files.update(_write_shards(source, layout, folder))
        files.update(_write_side_files(source, layout, taken, folder))
        written = tuple(sorted(name for name, file in files.items() if "link" not in file.made))
        certificate = replace(
            certificate, files_written=written, bytes_written=sum(files[name].written for name in written)
        )
        record = Record(
            plan=plan,
            plan_digest=plan.digest(),
            certificate=certificate,
            changes=_proven(source, changes, layout, folder),
            files=files,
            patches={name: tuple(patches) for name, patches in layout.patches.items()},
            source_name=source.folder.resolve().name,
            source_sha256={name: sha256_file(source.folder / name) for name in layout.patches},
            left_out=tuple(left_out),
        )
        write_text(folder / RECORD, record.to_text())
    return certificate


def existing_parent(target: Path) -> Path:
    """The nearest folder above a path that is there."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def _needed(source: Checkpoint, layout: TargetLayout, copy: bool) -> int:
    copied = source.shards if copy else tuple(layout.rewritten)
    extra = sum(c.tensor.num_bytes for c in layout.extra_changes) + sum(len(t.data) for t in layout.created)
    return sum(data_size(source.path(shard)) for shard in copied) + extra


def _changed_bytes(work: Work) -> int:
    return sum(edit.end - edit.begin for edits in work.edits.values() for edit in edits)


def _place_shards(
    source: Checkpoint, layout: TargetLayout, place: Place, folder: Path, hash_all: bool
) -> dict[str, RecordedFile]:
    """Put the unchanged shards where they belong."""
    kept = [shard for shard in source.shards if shard not in layout.rewritten]
    hashed = place is copy_file or hash_all or sum(source.path(shard).stat().st_size for shard in kept) <= HASH_LIMIT
    made = "copied" if place is copy_file else "symlinked" if place is symbolic_link else "linked"
    files = {}
    for shard in kept:
        path = folder / layout.names[shard]
        files[path.name] = recorded(path, made, shard, hashed, place(source.path(shard), path))
    return files


def _write_shards(source: Checkpoint, layout: TargetLayout, folder: Path) -> dict[str, RecordedFile]:
    """Rewrite the shards that hold changed tensors, and write the extra one."""
    files = {}
    for shard, changes in layout.rewritten.items():
        path = folder / layout.names[shard]
        size = copy_file(source.path(shard), path)
        with open(path, "r+b") as file:
            for change in changes:
                for edit in change.edits:
                    for offset, piece in change.edited(source, edit):
                        write_at(file.fileno(), piece, change.tensor.begin + offset)
                        size += len(piece)
            os.fsync(file.fileno())
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


def recorded(path: Path, made: str, source: str | None, hashed: bool, written: int) -> RecordedFile:
    """What steering.json says about a file."""
    status = path.stat()
    return RecordedFile(
        made=made,
        source=source,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=sha256_file(path) if hashed else None,
        written=written,
    )


def _proven(
    source: Checkpoint, changes: Sequence[Change], layout: TargetLayout, folder: Path
) -> tuple[ChangedTensor, ...]:
    """Read every changed and new tensor back from the target; OSError when it is not what was meant to be written."""
    homes = {change.tensor.name: _home(change, layout) for change in changes}
    homes.update({tensor.name: layout.extra for tensor in layout.created if layout.extra})
    written = {shard: open_shard(folder / shard) for shard in set(homes.values())}
    after = {name: written[shard].sha256(written[shard].tensors[name]) for name, shard in homes.items()}
    found = [
        ChangedTensor(
            name=change.tensor.name,
            shard=homes[change.tensor.name],
            source_shard=change.tensor.shard,
            dtype=change.tensor.dtype,
            shape=change.tensor.shape,
            edits=change.edits,
            sha256_before=change.before,
            sha256_after=change.sha256(source),
        )
        for change in changes
    ]
    for tensor in layout.created:
        digest = hashlib.sha256(tensor.data).hexdigest()
        found.append(
            ChangedTensor(
                name=tensor.name,
                shard=homes[tensor.name],
                source_shard=None,
                dtype=tensor.dtype,
                shape=tensor.shape,
                edits=(),
                sha256_before=None,
                sha256_after=digest,
            )
        )
    for tensor_record in found:
        if after[tensor_record.name] != tensor_record.sha256_after:
            raise OSError(errno.EIO, f"{tensor_record.name} did not arrive on the disk as it was written")
    return tuple(found)


def _home(change: Change, layout: TargetLayout) -> str:
    return layout.extra if layout.extra and change in layout.extra_changes else layout.names[change.tensor.shard]
