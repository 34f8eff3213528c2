"""``bake``: a plan written into a copy of a model. ``unbake``: the original model from the baked one, proven by the hashes that the bake wrote down."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from moe_steer.baking.edits import Change, Container, write_changed
from moe_steer.baking.folder_files import copy_file, data_size, placing, read_text, refuse_full_disk, write_text
from moe_steer.baking.gguf_model import GgufModel, is_gguf
from moe_steer.baking.gguf_record import gguf_record_path
from moe_steer.baking.gguf_writing import bake_gguf, restore_gguf
from moe_steer.baking.planning import Certificate, check_overlay, refuse_plan
from moe_steer.baking.record import BakeMismatch, ChangedTensor, Record
from moe_steer.baking.safetensors.folder import open_shard
from moe_steer.baking.safetensors.target import apply_patches, reverse_patches
from moe_steer.baking.safetensors.writing import bake_checkpoint
from moe_steer.baking.staging import refuse_target, staged, staging
from moe_steer.baking.verification import check_bake, read_bake, stored
from moe_steer.gguf import export_control_vector
from moe_steer.plan import SteeringPlan

StrPath = str | os.PathLike[str]


def bake(
    model: StrPath,
    plan: SteeringPlan,
    out: StrPath,
    overlay: str | None = None,
    *,
    copy: bool = False,
    symlink: bool = False,
    round_gains: bool = False,
    hash_all: bool = False,
    control_vector: StrPath | None = None,
) -> Certificate:
    """Write ``plan`` into a copy of a model, which any engine then serves as it is; returns what was done, and how exactly.

    A gain multiplies what makes the expert's output: its down projection (weights or their scales, and its bias). That equals
    the gain on the gate weight, because the output is weight * projection(x).

    ``model``: a folder with config.json and safetensors files, or a GGUF file (the first part of a model in several parts); it
    is only read. ``out``: the folder or file to write, which must not exist (a folder may be empty); it appears when all is
    done, or not at all. ``overlay``: put the changed tensors into a small shard of their own instead of rewriting the shards
    that hold them. The old tensors then stay in the folder under the same names, so its value says how the engine reads shards
    (``certificate.LOADERS``): any other way serves the plain model. Unchanged shards are hard-linked; ``copy`` copies them, ``symlink`` points to them. Every copy shares its
    source's blocks where the file system can (XFS, btrfs), so that only changes are written. ``round_gains``: where a format
    holds only powers of two, take the nearest one, and accept GGUF scales that lose bits below their format's range.
    ``hash_all``: hash unchanged shards as well, however large. ``control_vector``: write the plan's residual vectors to this
    GGUF control vector instead of baking them. ``overlay``, ``symlink`` and ``hash_all`` are for folders.

    ValueError for plans and models that cannot be baked, OSError when writing failed; nothing is left then.
    """
    if is_gguf(model):
        for option, value in (("overlay", overlay is not None), ("symlink", symlink), ("hash-all", hash_all)):
            if value:
                raise ValueError(f"--{option} is for checkpoint folders, and {os.fspath(model)} is a GGUF file")
        refuse_plan(plan)
        return bake_gguf(model, plan, Path(out), copy=copy, round_gains=round_gains, control_vector=control_vector)
    if control_vector is not None:
        export_control_vector(dataclasses.replace(plan, experts=(), top_k=()), control_vector)
        plan = dataclasses.replace(plan, residual=())
    refuse_plan(plan)
    check_overlay(overlay)
    return bake_checkpoint(
        model,
        plan,
        Path(out),
        loader=overlay,
        copy=copy,
        symlink=symlink,
        round_gains=round_gains,
        hash_all=hash_all,
    )


def unbake(
    baked: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    copy: bool = False,
    symlink: bool = False,
) -> Record:
    """Restore the model that was baked, bit for bit; returns the record of the bake.

    A folder's original is written to ``out``; a GGUF file is replaced by its original (without ``out``). An overlay still has
    the original tensors. Other changes are divided out, which restores powers of two and often nothing else; every tensor must
    have the hash it had before. ValueError names what cannot be restored, before anything is written. Files that were left out
    of the baked folder (weights in other formats) do not come back.
    """
    if is_gguf(baked) and (out is not None or copy or symlink):
        raise ValueError("a GGUF file is restored in place: give --baked alone")
    if out is None and not is_gguf(baked):
        raise ValueError("give --out, the folder to write the original to")
    place, _ = placing(copy, symlink)
    record, model = read_bake(baked)
    if isinstance(model, GgufModel):
        _unbake_gguf(model, record)
    if out is None:
        return record
    folder, target = Path(baked), Path(out)
    refuse_target(target, folder)
    check_bake(model, record, times_count=False)
    undone = _undone(model, record)
    copied = [name for name in record.files if name in undone or (copy and name.endswith(".safetensors"))]
    needed = sum(data_size(folder / name) for name in copied)
    refuse_full_disk(target, needed, folder / "config.json", "give a folder on another disk")
    with staging(target) as restored:
        for name, file in record.files.items():
            if file.source is None:
                continue
            path = staged(restored, file.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in undone:
                write_changed(model, name, undone[name], path)
            elif name in record.patches:
                _restore_text(folder / name, path, record, file.source)
            elif name.endswith(".safetensors"):
                place(folder / name, path)
            else:
                copy_file(folder / name, path)
    return record


def _unbake_gguf(model: GgufModel, record: Record) -> None:
    """Put the original of a GGUF file in its place. A run that was killed is completed by the next one."""
    restore_gguf(model, [change for parts in _undone(model, record).values() for change in parts])
    gguf_record_path(model.first).unlink()


def _undone(baked: Container, record: Record) -> dict[str, list[Change]]:
    """Shard of the baked model -> what restores its tensors; ValueError when numbers are gone."""
    undone: dict[str, list[Change]] = {}
    for change in record.changes:
        if change.source_shard is None:
            continue
        if record.files[change.shard].source is None:
            _check_original(baked, change, record)
            continue
        tensor = stored(baked, change)
        found = baked.sha256(tensor)
        if found == change.sha256_before and isinstance(baked, GgufModel):
            continue  # restored by a run that was killed
        if found != change.sha256_after:
            raise BakeMismatch(
                f"{change.where} is not what the bake wrote: it was changed since, so it cannot be taken back"
            )
        undone.setdefault(change.shard, []).append(_inverse(baked, change, record.source_name))
    return undone


def _inverse(baked: Container, change: ChangedTensor, source: str) -> Change:
    if any(edit.factor == 0 for edit in change.edits):
        other_way = "" if change.span else "; an overlay could be taken back"
        raise ValueError(
            f"{change.where} was silenced (gain 0) and its numbers are gone: take the original checkpoint, {source}{other_way}"
        )
    back = Change(tensor=stored(baked, change), edits=tuple(edit.inverse() for edit in change.edits))
    if back.sha256(baked) != change.sha256_before:
        factors = ", ".join(sorted({f"{edit.factor:g}" for edit in change.edits}))
        raise ValueError(
            f"{change.where} cannot be restored bit for bit: gain {factors} was rounded when it was baked; take the original checkpoint, {source}"
        )
    return back


def _check_original(baked: Container, change: ChangedTensor, record: Record) -> None:
    """The tensor that an overlay hides must still be the original one."""
    name = next(name for name, file in record.files.items() if file.source == change.source_shard)
    shard = open_shard(baked.path(name))
    if shard.sha256(shard.tensors[change.name]) != change.sha256_before:
        raise BakeMismatch(f"{change.name} in {name} is not the original any more: take the original checkpoint")


def _restore_text(source: Path, path: Path, record: Record, name: str) -> None:
    text = apply_patches(read_text(source), reverse_patches(record.patches[source.name]), source.name)
    if hashlib.sha256(text.encode()).hexdigest() != record.source_sha256[name]:
        raise BakeMismatch(f"{source} cannot be taken back to the original {name}: it was changed after baking")
    write_text(path, text)
