"""Check a baked model: against its own record, and byte for byte against the source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_steer.baking.edits import Change, Container, StoredTensor
from moe_steer.baking.folder_files import INDEX_SUFFIX, first_difference, read_text, sha256_file
from moe_steer.baking.gguf_model import GgufModel, is_gguf, read_gguf
from moe_steer.baking.gguf_record import gguf_record_path, read_gguf_record
from moe_steer.baking.planning import Certificate
from moe_steer.baking.record import BakeMismatch, ChangedTensor, Record, RecordedFile, has_record, read_record
from moe_steer.baking.safetensors.folder import Checkpoint, open_checkpoint
from moe_steer.baking.safetensors.target import apply_patches


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked. ``tensors``: changed tensors (GGUF: slices). ``hashed``: files whose hash was compared.

    ``compared_bytes``: bytes of weights compared with the source, 0 without it. ``unhashed``: files of which only size and
    time (GGUF: size) were checked, because they have no hash and no source was given.
    """

    certificate: Certificate
    tensors: int
    files: int
    hashed: int
    compared_bytes: int
    unhashed: tuple[str, ...]


def verify_bake(baked: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> Verification:
    """Check every file and every changed tensor of a baked folder or GGUF file; ValueError names the first that is wrong.

    Without ``source`` the model is checked against the hashes of its record. With the original model the edits are carried out
    again, and all that was not edited is compared byte by byte (or found to be the same file).
    """
    record, model = read_bake(baked)
    check_bake(model, record, times_count=source is None)
    compared = 0 if source is None else _compare_with_source(model, record, open_source(source))
    unhashed = tuple(name for name, file in record.files.items() if file.sha256 is None)
    return Verification(
        certificate=record.certificate,
        tensors=len(record.changes),
        files=len(record.files),
        hashed=len(record.files) - len(unhashed),
        compared_bytes=compared,
        unhashed=unhashed if source is None else (),
    )


def open_source(path: str | os.PathLike[str]) -> Container:
    """The original model of a bake; ValueError for a baked one."""
    source: Container = read_gguf(Path(path)) if is_gguf(path) else open_checkpoint(path)
    is_baked = gguf_record_path(source.first).exists() if isinstance(source, GgufModel) else has_record(Path(path))
    if is_baked:
        raise ValueError(f"{os.fspath(path)} is itself baked: give the original model as the source")
    return source


def read_bake(path: str | os.PathLike[str]) -> tuple[Record, Container]:
    """The record of a baked model and its files; ValueError when one is missing, and where there are others that engines load."""
    if is_gguf(path):
        model = read_gguf(Path(path))
        return read_gguf_record(model), model
    record = read_record(path)
    _check_names(Path(path), record)
    try:
        return record, open_checkpoint(path)
    except ValueError as error:
        raise BakeMismatch(f"the baked folder is not whole: {error}") from error


def check_bake(model: Container, record: Record, times_count: bool) -> None:
    """Check a baked model against its record; ``times_count``: a shard without a hash must have the time it had."""
    for name, file in record.files.items():
        size = model.path(name).stat().st_size
        if size != file.size:
            raise BakeMismatch(f"{model.path(name)} has {size} bytes and had {file.size} when it was baked: bake again")
    if isinstance(model, GgufModel):
        _check_headers(model, record)
    for change in record.changes:
        _check_change(model, change)
    for name, file in record.files.items():
        _check_file(model.path(name), file, times_count)


def _check_names(folder: Path, record: Record) -> None:
    for name in record.files:
        if not (folder / name).is_file():
            raise BakeMismatch(f"{folder / name} is missing: bake again")
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".safetensors", INDEX_SUFFIX)) and path.name not in record.files:
            raise BakeMismatch(f"{path} was not written by the bake, and an engine may load it: remove it")


def _check_headers(model: GgufModel, record: Record) -> None:
    for part, digest in record.headers.items():
        if sha256_file(model.path(part), model.header_bytes[part]) != digest:
            raise BakeMismatch(
                f"the header of {model.path(part)} (metadata or tensor table) was changed after the bake: bake again"
            )


def _check_file(path: Path, file: RecordedFile, times_count: bool) -> None:
    if file.sha256 is not None:
        if sha256_file(path) != file.sha256:
            raise BakeMismatch(f"{path} was changed after baking: its hash differs; bake again")
    elif times_count and file.mtime_ns is not None and path.stat().st_mtime_ns != file.mtime_ns:
        raise BakeMismatch(
            f"{path} has no hash, and its time differs from that of the bake: pass the source to compare it, or bake again with hashes of all shards"
        )


def stored(model: Container, change: ChangedTensor) -> StoredTensor:
    """Where a changed tensor, or the changed part of it, is in the baked model; BakeMismatch when it is not there."""
    tensor = model.tensors.get(change.name)
    if tensor is None or (tensor.shard, tensor.dtype, tensor.shape) != (change.shard, change.dtype, change.shape):
        raise BakeMismatch(f"{change.name} is not where the record says, in {change.shard}: bake again")
    if change.span is None and any(edit.end > tensor.num_bytes for edit in change.edits):
        raise BakeMismatch(f"{change.name} has {tensor.num_bytes} bytes, and its record says more: bake again")
    return _spanned(tensor, change)


def _spanned(tensor: StoredTensor, change: ChangedTensor) -> StoredTensor:
    return tensor if change.span is None else replace(tensor, begin=change.span[0], end=change.span[1])


def _check_change(model: Container, change: ChangedTensor) -> None:
    tensor = stored(model, change)
    found = model.sha256(tensor)
    if found == change.sha256_after:
        return
    where = f"{change.where} in {model.path(tensor.shard)}"
    if found == change.sha256_before:
        raise BakeMismatch(f"{where} is the original, without the plan: bake again")
    raise BakeMismatch(f"{where} was changed after baking: its hash differs; bake again")


def _compare_with_source(baked: Container, record: Record, source: Container) -> int:
    """BakeMismatch unless the baked model is the source with exactly the recorded edits; returns the bytes compared."""
    for name, file in record.files.items():
        if name in baked.paths and file.source is not None and file.source not in source.paths:
            raise BakeMismatch(f"the source has no file for {baked.path(name)}: this is not the model that was baked")
    changes = {change.name: change for change in record.changes}
    for name in sorted(set(baked.tensors) ^ set(source.tensors)):
        if name not in changes or changes[name].source_shard is not None:
            where = "baked model" if name in source.tensors else "source"
            raise BakeMismatch(f"{name} is not in the {where}: this is not the model that was baked")
    for change in record.changes:
        if change.source_shard is not None:
            _compare_changed(change, source)
    compared = _compare_shards(baked, record, source)
    if isinstance(baked, Checkpoint) and isinstance(source, Checkpoint):
        _compare_texts(baked.folder, record, source.folder)
    return compared


def _compare_changed(change: ChangedTensor, source: Container) -> None:
    tensor = _spanned(source.tensors[change.name], change)
    if source.sha256(tensor) != change.sha256_before:
        raise BakeMismatch(
            f"{change.where} of the source is not the tensor that was baked: another model, or changed since"
        )
    if Change(tensor=tensor, edits=change.edits).sha256(source) != change.sha256_after:
        raise BakeMismatch(f"{change.where} is not the source's tensor with the recorded edits: bake again")


def _compare_shards(baked: Container, record: Record, source: Container) -> int:
    """All data of kept and rewritten shards, except for the tensors edited in place."""
    compared = 0
    for name, file in record.files.items():
        if file.source is None or name not in baked.paths:
            continue
        ours, theirs = baked.path(name), source.path(file.source)
        compared += ours.stat().st_size
        if os.path.samefile(ours, theirs):
            if file.sha256 is None and file.mtime_ns is not None and ours.stat().st_mtime_ns != file.mtime_ns:
                raise BakeMismatch(
                    f"{ours} is the same file as the source's and was changed after baking: fetch the source again"
                )
            continue
        if ours.stat().st_size != theirs.stat().st_size:
            raise BakeMismatch(f"{ours} and {theirs} have different sizes: this is not the model that was baked")
        edited = [
            _spanned(source.tensors[change.name], change)
            for change in record.changes
            if change.shard == name and change.source_shard == file.source
        ]
        at = first_difference(ours, theirs, ((tensor.begin, tensor.end) for tensor in edited))
        if at is not None:
            raise BakeMismatch(
                f"{ours} differs from {theirs} at byte {at}, where nothing was baked ({_owner(baked.tensors, name, at)}): bake again"
            )
    return compared


def _owner(tensors: Mapping[str, StoredTensor], shard: str, byte: int) -> str:
    found = (it.name for it in tensors.values() if it.shard == shard and it.begin <= byte < it.end)
    return next(found, "no tensor's data")


def _compare_texts(folder: Path, record: Record, source: Path) -> None:
    """Config, tokenizer, index and the like: the source's, with the recorded patches."""
    for name, file in record.files.items():
        if file.source is None or name.endswith(".safetensors"):
            continue
        if not (source / file.source).is_file():
            raise BakeMismatch(f"{source / file.source} is missing: this is not the model that was baked")
        if name in record.patches:
            text = apply_patches(read_text(source / file.source), record.patches[name], name)
            same = text == read_text(folder / name)
        else:
            same = sha256_file(source / file.source) == sha256_file(folder / name)
        if not same:
            raise BakeMismatch(f"{folder / name} is not the source's {file.source}: bake again")
