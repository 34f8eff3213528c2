"""Files that appear whole or not at all, and safetensors files with one JSON header under a metadata key of their own.

Files of ``torch.save``, opened without running any code in them. torch is imported only where tensors are read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moe_steer.json_files import parse_json, quoted


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what will be at ``path``: renamed to it at the end of the block, removed when the block fails.

    The folder is made where it is missing. The content is on the disk before it gets its name, so that neither a reader nor a
    power cut meets half a file. Permissions are those of any new file.
    """
    target = Path(path)
    aside = _aside(target)
    try:
        yield aside
        _sync(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(target.parent)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """The whole content of a file; text as UTF-8."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def create_whole(path: str | os.PathLike[str], text: str) -> None:
    """As ``write_whole``, but a file that another rank made in the meantime stays."""
    target = Path(path)
    aside = _aside(target)
    try:
        aside.write_bytes(text.encode())
        _sync(aside)
        try:
            os.link(aside, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _aside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Random rather than this process's number: ranks on several machines may write into one folder. Cut, because the name of
    # the target may be as long as a name may be.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can sync a folder
        _sync(folder)


T = TypeVar("T")


class HeadedKind(NamedTuple):
    """A kind of safetensors file with a header, and the words for what is wrong with one."""

    key: str
    """Where the file's metadata keeps the header, as JSON."""
    version: int
    noun: str
    """What the file is a file of: 'there is no NOUN file', ..."""
    content: str
    """What it holds: 'and no CONTENT'."""
    command: str
    """What makes one."""
    again: str
    """What to do with a damaged one."""


class Headed(NamedTuple):
    """What a safetensors file holds."""

    header: dict[str, Any] | None
    """JSON values; None where there is no header."""
    names: list[str]
    """Of all its tensors."""
    tensors: dict[str, Any]
    """Those that were asked for and are there."""


def read_tensors(path: str | os.PathLike[str], framework: str = "pt") -> tuple[Mapping[str, str], dict[str, Any]]:
    """Metadata and all tensors of a safetensors file (``framework``: pt or np); the library's own errors."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework=framework) as reader:
        return reader.metadata() or {}, {name: reader.get_tensor(name) for name in list(reader.keys())}


def read_headed(
    path: str | os.PathLike[str], key: str, again: str, wanted: Collection[str] | None = None, framework: str = "pt"
) -> Headed:
    """The header under the metadata key ``key``, and the ``wanted`` tensors (default: all).

    ``again``: what to do with a damaged file. ValueError in one line for a file that is damaged or cannot be opened, and for a
    header that is not a JSON object.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, framework=framework) as reader:
            names = list(reader.keys())
            asked = [one for one in names if wanted is None or one in wanted]
            text = (reader.metadata() or {}).get(key)
            tensors = {one: reader.get_tensor(one) for one in asked}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is not a whole safetensors file ({error}): {again}") from error
    header = None if text is None else parse_json(text, f"{name} has a header that", again)
    if header is not None and not isinstance(header, dict):
        raise ValueError(f"{name} has the header {quoted(header)}, which is not a JSON object: {again}")
    return Headed(header, names, tensors)


def load_headed(
    path: str | os.PathLike[str],
    kind: HeadedKind,
    names: set[str],
    build: Callable[[dict[str, Any], dict[str, Any]], T],
    framework: str = "pt",
) -> T:
    """``build(header, tensors)`` of a file of one kind, which holds exactly the tensors ``names``.

    ValueError in one line, with the file's name, for whatever is wrong with it, inside ``build`` too.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise ValueError(f"there is no {kind.noun} file {name!r}: make one with '{kind.command}'")
    found = read_headed(path, kind.key, kind.again, names, framework)
    if found.header is None or set(found.names) != names:
        raise ValueError(
            f"{name} holds {sorted(found.names)[:6]} and no {kind.content}: give a file of '{kind.command}'"
        )
    try:
        version = found.header.get("version")
        if version != kind.version:
            raise ValueError(f"its version is {quoted(version)}, this program reads version {kind.version}")
        return build(found.header, found.tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def load_plain(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors and plain containers holds, on the CPU. ValueError, in one line, for any other pickle: torch's own
    words are left out, which advise to run the code in it."""
    import torch

    name = os.fspath(path)
    try:
        return torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler's own errors have no common kind
        raise ValueError(
            f"{name} is damaged, or no file of plain tensors, and other pickles are not opened: download it again, or convert it"
        ) from error
