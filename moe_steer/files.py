"""Files that appear whole or not at all, and safetensors files with one JSON header under a metadata key of their own.

Files of ``torch.save``, opened without running any code in them. torch is imported only where tensors are read.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moe_steer.errors import FULL_DISK
from moe_steer.json_files import parse_json, quoted, read_json, short

_NAMES_BY_BITS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
BITS = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
"""Bits of one element, by the names of the safetensors format."""
_MAX_HEADER = 100_000_000
"""The limit of the format, in bytes."""


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what will be at ``path``: renamed to it at the end of the block, removed when the block fails.

    The folder is made where it is missing. The content is on the disk before it gets its name, so that neither a reader nor a
    power cut meets half a file. Permissions are those of any new file.
    """
    target = Path(path)
    aside = _aside(target)
    try:
        with naming_full_disk(target):
            yield aside
            _sync(aside)
            os.replace(aside, target)
    finally:
        with suppress(OSError):  # nothing to remove, or no way to, which is not what failed
            aside.unlink()
    _sync_folder(target.parent)


@contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block, the error of a full disk is an OSError with this file's name, whatever library met it and in whatever
    words (safetensors: "os error 28"; torch: "PytorchStreamWriter failed writing file"); so is any error that names the file
    which becomes it."""
    try:
        yield
    except Exception as error:
        code: Any = getattr(error, "errno", None)
        aside = Path(str(getattr(error, "filename", None)))
        if code not in FULL_DISK and not (aside.suffix == ".tmp" and aside.parent == Path(path).parent):
            torn = re.search(
                r"errno 28|os error (?:28|122)|No space left|PytorchStreamWriter|unexpected pos", str(error)
            )
            if torn is None or (torn[0][0] in "Pu" and shutil.disk_usage(Path(path).parent).free > 1 << 20):
                raise
            code = errno.ENOSPC
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """The whole content of a file; text as UTF-8."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def create_whole(path: str | os.PathLike[str], text: str) -> None:
    """As ``write_whole``, but a file that another rank made in the meantime stays."""
    target = Path(path)
    aside = _aside(target)
    try:
        with naming_full_disk(target):
            aside.write_bytes(text.encode())
            _sync(aside)
        with suppress(FileExistsError):
            name_new(aside, target)
    finally:
        with suppress(OSError):  # nothing to remove, or no way to, which is not what failed
            aside.unlink()
    _sync_folder(target.parent)


def name_new(made: Path, target: Path) -> None:
    """Give a whole file its name; FileExistsError where another process was first, which a rename would not see. Its old name may stay."""
    try:
        os.link(made, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.replace(made, target)


def _aside(target: Path) -> Path:
    if target.is_dir():  # a rename to it would complain of the name that the file has until then
        raise IsADirectoryError(errno.EISDIR, "is a folder: name a file", os.fspath(target))
    with naming_full_disk(target.parent):
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


class Placed(NamedTuple):
    """A tensor of a safetensors file, by its header: bytes ``begin`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_places(path: str | os.PathLike[str]) -> dict[str, Placed]:
    """Where the tensors of a safetensors file lie, from its header alone: 8 bytes of length, JSON, data without gaps.

    ValueError says, without the file's name, what is wrong with header or length; OSError where it cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"it has no safetensors header: {size} bytes cannot hold one")
        header = parse_json(file.read(length), "its header", "it was changed or cut")
    if not isinstance(header, dict):
        raise ValueError(f"its header is {quoted(header)}")
    header.pop("__metadata__", None)
    found = {name: _placed(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, place in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"the data of {quoted(name)} does not follow its neighbour's")
        end = place.end
    if end != size:
        raise ValueError(f"{size} bytes, {end} expected")
    return found


def read_weight_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor -> file of a checkpoint's index; ValueError, in one line, for anything that is no index, and for files that are not
    in its own folder."""
    name = os.fspath(path)
    weight_map = read_json(path, "fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{name} is not an index of weight files: it has no weight_map; fetch it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{name} puts {short(tensor)} into {quoted(file)}: a safetensors file of the same folder is needed"
            )
    return weight_map


def _placed(name: str, entry: Any, data: int) -> Placed:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        bits = BITS.get(dtype)
        fits = whole and begin <= end and (bits is None or math.prod(shape) * bits == (end - begin) * 8)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"its header's entry of {quoted(name)} contradicts itself")
    return Placed(dtype, shape, data + begin, data + end)


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
        tensor_places(name)  # the library takes the last of two tensors of one name
        with safe_open(name, framework=framework) as reader:
            names = list(reader.keys())
            asked = [one for one in names if wanted is None or one in wanted]
            text = (reader.metadata() or {}).get(key)
            tensors = {one: reader.get_tensor(one) for one in asked}
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:  # the last: sizes of no array
        raise ValueError(f"{name} is not a whole safetensors file ({short(error)}): {again}") from error
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
        if type(version) is not int or version != kind.version:
            raise ValueError(f"its version is {quoted(version)}, this program reads version {kind.version}")
        return build(found.header, found.tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot be used: {'it lacks ' * isinstance(error, KeyError)}{short(error)}") from error


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
