"""Safetensors files of this project: tensors, and one JSON header under a metadata key of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class HeadedKind(NamedTuple):
    """A kind of file, and the words for what is wrong with one."""

    key: str
    """Where the file's metadata keeps the header."""
    version: int
    noun: str
    """What the file is a file of: 'there is no NOUN file', ..."""
    content: str
    """What it holds: 'and no CONTENT'."""
    command: str
    """What makes one."""
    again: str
    """What to do with a damaged one."""


def read_tensors(path: str | os.PathLike[str], framework: str = "pt") -> tuple[Mapping[str, str], dict[str, Any]]:
    """Metadata and all tensors of a safetensors file (``framework``: pt or np); the library's own errors."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework=framework) as reader:
        metadata = reader.metadata() or {}
        return metadata, {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a mapping)


def read_headed(
    path: str | os.PathLike[str],
    kind: HeadedKind,
    names: set[str],
    build: Callable[[dict[str, Any], dict[str, Any]], T],
    framework: str = "pt",
) -> T:
    """``build(header, tensors)`` of a file that holds exactly the tensors ``names``.

    ValueError in one line, with the file's name, for whatever is wrong with it, inside ``build`` too.
    """
    from safetensors import SafetensorError

    name = os.fspath(path)
    if not Path(path).is_file():
        raise ValueError(f"there is no {kind.noun} file {name!r}: make one with '{kind.command}'")
    try:
        metadata, tensors = read_tensors(path, framework)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is not a whole safetensors file ({error}): {kind.again}") from error
    if kind.key not in metadata or set(tensors) != names:
        raise ValueError(f"{name} holds {sorted(tensors)[:6]} and no {kind.content}: give a file of '{kind.command}'")
    try:
        header = json.loads(metadata[kind.key])
        if header.get("version") != kind.version:
            raise ValueError(f"its version is {header.get('version')!r}, this program reads version {kind.version}")
        return build(header, tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
