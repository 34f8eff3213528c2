"""Write a plan into a copy of a GGUF file, or of a model in several parts; and put a baked file's original back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_steer.baking.edits import Change, write_changed
from moe_steer.baking.folder_files import copy_file, hard_link, sha256_file, write_text
from moe_steer.baking.gguf_gains import plan_gains
from moe_steer.baking.gguf_model import GgufModel, part_names, read_gguf
from moe_steer.baking.gguf_record import gguf_record_path, gguf_record_text
from moe_steer.baking.planning import Certificate
from moe_steer.baking.record import Record, RecordedFile, proven, recorded
from moe_steer.baking.staging import staging
from moe_steer.files import name_new
from moe_steer.gguf import export_residual
from moe_steer.plan import SteeringPlan


def bake_gguf(
    source: str | os.PathLike[str],
    plan: SteeringPlan,
    target: Path,
    *,
    copy: bool,
    round_gains: bool,
    control_vector: str | os.PathLike[str] | None,
) -> Certificate:
    """As ``bake``, for a GGUF file or the first part of a model in several parts.

    ``target``: the file to write; a model's parts are named after it. The record is written next to it as ``NAME.steering.json``.
    """
    model = read_gguf(Path(source))
    if gguf_record_path(model.first).exists():
        raise ValueError(
            f"{model.first} already has a plan baked in ({gguf_record_path(model.first).name}): unbake it first, or bake from the original file"
        )
    if plan.active_residual and control_vector is None:
        raise ValueError(
            f"a GGUF model has no place for the plan's {len(plan.active_residual)} residual vectors: give --control-vector FILE to write them beside it"
        )
    names = _target_names(model, target)
    work = plan_gains(model, plan, round_gains)
    changes = work.changes(model)
    certificate = replace(work.certificate(model.architecture, "GGUF"), parts=names)
    with ExitStack() as undo:
        exported = None
        if control_vector is not None:
            exported = export_residual(plan, Path(control_vector), model.architecture)
            undo.callback(Path(control_vector).unlink, missing_ok=True)
        certificate = _write(model, plan, target, certificate, changes, copy, exported)
        undo.pop_all()
    return certificate


def _target_names(model: GgufModel, target: Path) -> tuple[str, ...]:
    """The file names of the baked model's parts; ValueError when one exists already."""
    if target.is_dir():
        raise ValueError(f"the target {str(target)!r} is a folder: give the name of the GGUF file to write")
    names = tuple(part_names(target.name, len(model.paths)))
    for path in map(target.with_name, names):
        if path.exists() and any(path.samefile(source) for source in model.paths.values()):
            raise ValueError(f"source and target are the same file {str(path)!r}: give another target")
        if os.path.lexists(path):
            raise ValueError(f"the target {str(path)!r} exists: give another name, or remove it first")
    return names


def _write(
    model: GgufModel,
    plan: SteeringPlan,
    target: Path,
    certificate: Certificate,
    changes: Sequence[Change],
    copy: bool,
    exported: Mapping[str, Any] | None,
) -> Certificate:
    """Write parts and record; parts without a change are links to the source, or copies where there are no links."""
    names = dict(zip(model.shards, certificate.parts, strict=True))
    rewritten = {change.tensor.shard for change in changes}
    if copy or len(names) == 1:
        rewritten = set(names)
    record_name = gguf_record_path(target.with_name(names["0"])).name
    shown_last = [*certificate.parts[1:], record_name, certificate.parts[0]]
    with staging(target, lambda folder, to: _publish(folder, to, shown_last)) as folder:
        files: dict[str, RecordedFile] = {}
        for part, name in names.items():
            path = folder / name
            if part in rewritten:
                mine = [change for change in changes if change.tensor.shard == part]
                written = write_changed(model, part, mine, path)
                files[part] = recorded(path, "rewritten", part, True, written)
            else:
                try:
                    hard_link(model.path(part), path)
                except ValueError:  # another file system, or one without hard links
                    copy_file(model.path(part), path)
                files[part] = recorded(path, "linked", part, False, 0)
        staged = replace(model, paths={part: folder / name for part, name in names.items()})
        certificate = replace(
            certificate,
            files_written=tuple(names[part] for part in names if part in rewritten),
            bytes_written=sum(file.written for file in files.values()),
        )
        record = Record(
            plan=plan,
            plan_digest=plan.digest(),
            certificate=certificate,
            changes=tuple(proven(model, ((change, staged, change.tensor) for change in changes), spans=True)),
            files=files,
            patches={},
            source_name=model.first.name,
            source_sha256={},
            headers={part: sha256_file(staged.path(part), size) for part, size in model.header_bytes.items()},
            control_vector=exported,
        )
        write_text(folder / record_name, gguf_record_text(record, model))
    return certificate


def _publish(folder: Path, target: Path, names: Sequence[str]) -> None:
    """Give the files their names, in this order; the first part comes last: without it no engine takes the others for a model.

    A link fails where another process made a file of that name in the meantime; a rename would replace it.
    """
    *_, record, first = map(target.with_name, names)
    if not os.path.lexists(first):  # then it was left by a killed run
        record.unlink(missing_ok=True)
    with ExitStack() as undo:
        for name in names:
            path = target.with_name(name)
            name_new(folder / name, path)
            undo.callback(path.unlink, missing_ok=True)
        undo.pop_all()


def restore_gguf(model: GgufModel, changes: Sequence[Change]) -> None:
    """Replace each part that holds changes by a copy with them, one whole file after the other.

    A process that is killed in between leaves some parts restored, each of them whole; the next run restores the rest.
    """
    parts = sorted({change.tensor.shard for change in changes})
    for path in map(model.path, parts):
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link to {path.resolve()}: give the file itself")
    names = {part: model.path(part).name for part in parts}
    with staging(model.first, lambda folder, to: _replace(folder, to, list(names.values()))) as folder:
        for part, name in names.items():
            write_changed(model, part, [change for change in changes if change.tensor.shard == part], folder / name)
            shutil.copymode(model.path(part), folder / name)
        staged = replace(model, paths={part: folder / name for part, name in names.items()})
        proven(model, ((change, staged, change.tensor) for change in changes))


def _replace(folder: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        os.replace(folder / name, target.with_name(name))
