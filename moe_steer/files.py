"""Safetensors files of this project: tensors, and one JSON header under a metadata key of their own.

Files that appear whole or not at all: written under a name of their own beside the place, then renamed into it.
Files of ``torch.save``, opened without running any code in them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what shall stand at ``path``: renamed to it at the end of the block, removed when the block fails.

    The folder is made where it is missing. Nothing is flushed to the disk: this is against readers of half a file, not
    against power cuts.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """The whole content of a file."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The whole content of a file, as UTF-8."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


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


def load_plain(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors and plain containers holds, on the CPU. ValueError, in one line, for any other pickle: torch's own
    words are left out, which advise to run the code in it."""
    name = os.fspath(path)
    try:
        return torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler's own errors have no common kind
        raise ValueError(
            f"{name} is damaged, or no file of plain tensors, and other pickles are not opened: download it again, or convert it"
        ) from error
