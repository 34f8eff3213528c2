"""Files linked, copied without filling holes, compared, hashed. The source is only ever opened for reading."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

PIECE = 1 << 23
"""Bytes that are read at once."""
INDEX_SUFFIX = ".safetensors.index.json"
Place = Callable[[Path, Path], int]
"""(source, target): makes the target have the source's content; returns the bytes of data that were written for it."""

FICLONE = 0x40049409
"""Linux's request to share all blocks of a file (ioctl_ficlone(2)): XFS, btrfs, bcachefs, OCFS2, NFS 4.2 know it."""

OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"),
    ".index.json",
)


def hard_link(source: Path, target: Path) -> int:
    """A second name for the same data: no bytes are written. ValueError where the file system has none."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        raise ValueError(
            f"{source.name} cannot be hard-linked into {target.parent.parent.parent} ({os.strerror(error.errno or 0)}): choose a folder of your own on the same file system, or give --copy or --symlink"
        ) from None
    return 0


def symbolic_link(source: Path, target: Path) -> int:
    """A pointer to the source's file: the source must stay where it is."""
    os.symlink(os.path.realpath(source), target)
    return 0


def placing(copy: bool, symlink: bool) -> tuple[Place, str]:
    """How unchanged files are put into the target, and the record's word for it."""
    if copy and symlink:
        raise ValueError("copy and symlink exclude each other: choose one")
    return (copy_file, "copied") if copy else (symbolic_link, "symlinked") if symlink else (hard_link, "linked")


def copy_file(source: Path, target: Path) -> int:
    """A file of its own with the source's data, on the disk; holes stay holes. Returns the bytes written for it.

    Where the file system can share blocks the two share them, nothing is written, and a later change of either file takes only
    the blocks it touches.
    """
    written = 0
    with open(source, "rb") as reader, open(target, "xb") as writer:
        if not clone(reader.fileno(), writer.fileno()):
            size = os.fstat(reader.fileno()).st_size
            for begin, end in _extents(reader.fileno(), size):
                _copy_range(reader.fileno(), writer.fileno(), begin, end)
                written += end - begin
            writer.truncate(size)
        os.fsync(writer.fileno())
    return written


def copy_with_edits(source: Path, target: Path, edits: Sequence[tuple[int, bytes]]) -> int:
    """``copy_file``, then other bytes at some offsets; returns the bytes written for both."""
    written = copy_file(source, target)
    with open(target, "r+b") as file:
        for offset, data in edits:
            write_at(file.fileno(), data, offset)
            written += len(data)
        os.fsync(file.fileno())
    return written


def clone(reader: int, writer: int) -> bool:
    """Let an empty file share all blocks of another one; False where the file system cannot do that."""
    try:
        fcntl.ioctl(writer, FICLONE, reader)
    except OSError:  # whatever the reason, a plain copy works or says why it does not
        os.ftruncate(writer, 0)
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether a new file in ``folder`` can share the blocks of ``source``."""
    try:
        with open(source, "rb") as reader, tempfile.TemporaryFile(dir=folder) as writer:
            return clone(reader.fileno(), writer.fileno())
    except OSError:  # no file can be made there; writing will fail with the reason
        return False


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of a file that hold data."""
    at = 0
    while at < size:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            begin, end = at, size
        yield begin, end
        at = end


def _copy_range(reader: int, writer: int, begin: int, end: int) -> None:
    os.lseek(reader, begin, os.SEEK_SET)
    while begin < end:
        piece = os.pread(reader, min(PIECE, end - begin), begin)
        if not piece:
            raise OSError(errno.EIO, "the source became shorter while it was copied")
        write_at(writer, piece, begin)
        begin += len(piece)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_text(target: Path, text: str) -> int:
    """A new file with this text, on the disk; returns its size in bytes."""
    data = text.encode("utf-8")
    with open(target, "xb") as file:
        write_at(file.fileno(), data, 0)
        os.fsync(file.fileno())
    return len(data)


def read_text(path: Path) -> str:
    """A text file with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def sha256_file(path: Path, num_bytes: int | None = None) -> str:
    """Hash of a file's data, or of its first bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        while piece := file.read(min(PIECE, left)):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def first_difference(ours: Path, theirs: Path, skipped: Iterable[tuple[int, int]]) -> int | None:
    """Offset of the first byte, outside of the ranges ``skipped``, that differs in two files of one size."""
    at = 0
    with open(ours, "rb") as a, open(theirs, "rb") as b:
        for begin, end in [*sorted(skipped), (os.fstat(a.fileno()).st_size,) * 2]:
            while at < begin:
                size = min(PIECE, begin - at)
                x, y = os.pread(a.fileno(), size, at), os.pread(b.fileno(), size, at)
                if x != y:
                    return at + next(i for i in range(len(x)) if x[i : i + 1] != y[i : i + 1])
                at += size
            at = end
    return None


def side_files(folder: Path, shards: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Files of a checkpoint that are not weights (to copy), and weights in other formats (to leave out).

    Paths are relative to the folder. Hidden folders are not looked into.
    """
    taken: list[str] = []
    left: list[str] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(root, name), folder)
            if relative in shards or not os.path.isfile(os.path.join(root, name)):
                continue
            is_weight = name.endswith(OTHER_WEIGHTS) and not name.endswith(INDEX_SUFFIX)
            (left if is_weight else taken).append(relative)
    return taken, left


def refuse_full_disk(target: Path, needed: int, source: Path, other_way: str) -> None:
    """ValueError when the target's file system has less room than will be written, and cannot share ``source``'s blocks."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free and not can_clone(source, parent):
        raise ValueError(
            f"{parent} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB would be written: make room, or {other_way}"
        )


def data_size(path: Path) -> int:
    """Bytes that a copy without the holes takes."""
    status = path.stat()
    return min(status.st_size, status.st_blocks * 512) if hasattr(status, "st_blocks") else status.st_size
