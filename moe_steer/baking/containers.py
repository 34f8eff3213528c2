"""The two containers by their paths: a folder is a safetensors checkpoint, a file is a GGUF model."""

from __future__ import annotations

import os
from pathlib import Path

from moe_steer.baking.edits import Container
from moe_steer.baking.gguf.model import GgufModel, read_gguf
from moe_steer.baking.gguf.record import gguf_record_path, read_gguf_record
from moe_steer.baking.gguf.undo_file import refuse_half_written
from moe_steer.baking.record import Record, has_record, read_record
from moe_steer.baking.safetensors.checkpoint import open_checkpoint


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model's path is that of a GGUF file: by its name, or because it is a file."""
    return os.fspath(path).endswith(".gguf") or Path(path).is_file()


def open_source(path: str | os.PathLike[str]) -> Container:
    """The original model of a bake; ValueError for a baked one."""
    source: Container = read_gguf(Path(path)) if is_gguf(path) else open_checkpoint(path)
    is_baked = gguf_record_path(source.first).exists() if isinstance(source, GgufModel) else has_record(Path(path))
    if is_baked:
        raise ValueError(f"{os.fspath(path)} is itself baked: give the original model as the source")
    return source


def read_bake(path: str | os.PathLike[str]) -> tuple[Record, Container | None]:
    """The record of a baked model, and the GGUF model; a checkpoint folder is opened when its files have been looked at."""
    if not is_gguf(path):
        return read_record(path), None
    model = read_gguf(Path(path))
    refuse_half_written(model.first)
    return read_gguf_record(model), model
