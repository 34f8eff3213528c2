"""Large targets, a folder or several files, that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LAST = "config.json"
"""Without it no engine takes a folder for a checkpoint, so it gets its name last."""
NEWBORN_SECONDS = 10.0
_PART = LAST + ".part"


def refuse_target(target: Path, source: Path) -> None:
    """ValueError unless ``target`` can become a new folder that has nothing to do with ``source``."""
    if target.exists() and os.path.samefile(target, source):
        raise ValueError(
            f"source and target are the same folder {target}: the source is never changed, give another target"
        )
    inner, outer = target.resolve(), source.resolve()
    if inner.is_relative_to(outer):
        raise ValueError(f"the target {target} lies inside the source {source}: give a folder outside of it")
    if outer.is_relative_to(inner):
        raise ValueError(f"the source {source} lies inside the target {target}: give another target")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} exists and is not a folder: give the name of a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"the target {target} exists and is not empty: remove it, or give the name of a new folder")


def as_folder(inner: Path, target: Path) -> None:
    """Give the folder of finished files its name: ``config.json`` last, then the whole."""
    os.rename(inner / _PART, inner / LAST)
    os.rename(inner, target)


@contextmanager
def staging(target: Path, publish: Callable[[Path, Path], None] = as_folder) -> Iterator[Path]:
    """Yields an empty folder whose files get their names at the end of the block; after an error nothing of them is left.

    The folder is two levels deep in a hidden sibling of the target, ``.NAME.unfinished-*``; the files of a process that was
    killed stay there, have no config.json, and are removed by the next run to the same target. Write ``config.json`` to
    ``staged(folder, "config.json")``. ``publish(folder, target)`` makes the files appear when all are on the disk. OSError
    tells what happened, with the target's name.
    """
    target = Path(os.path.abspath(target))
    with ExitStack() as undo:
        try:
            _make_parents(target.parent, undo)
            _remove_leftovers(target)
            outer = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
            undo.callback(shutil.rmtree, outer, ignore_errors=True)
            lock = undo.enter_context(open(outer / "lock", "wb"))
            with suppress(OSError):  # some network file systems have no locks, and then nobody removes leftovers
                fcntl.flock(lock, fcntl.LOCK_EX)
            inner = outer / "files"
            inner.mkdir()
            yield inner
            _sync_folders(inner)
            publish(inner, target)
        except OSError as error:
            why = f"{error.strerror or error}; nothing is left of it"
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                why = "another run has made it in the meantime, which stays: look at that one, or give another name"
            raise OSError(error.errno, f"{target} was not written: {why}, and the source is as it was") from error
        if target.is_dir():
            sync_folder(target)
        sync_folder(target.parent)
        undo.pop_all()
        lock.close()
        shutil.rmtree(outer, ignore_errors=True)


def staged(folder: Path, name: str) -> Path:
    """Where a file of the coming folder is to be written."""
    return folder / (_PART if name == LAST else name)


def _make_parents(parent: Path, undo: ExitStack) -> None:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir()
        undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_leftovers(target: Path) -> None:
    """Folders of runs to this target whose process is gone: nobody holds their lock."""
    for outer in target.parent.iterdir():
        if not outer.name.startswith(f".{target.name}.unfinished-"):
            continue
        try:
            with open(outer / "lock", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(outer, ignore_errors=True)
        except FileNotFoundError:  # killed right at its start or end, or a run that starts just now
            if time.time() - outer.stat().st_mtime > NEWBORN_SECONDS:
                shutil.rmtree(outer, ignore_errors=True)
        except OSError:  # another run is at work in it
            continue


def _sync_folders(folder: Path) -> None:
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
