"""Files that appear whole or not at all: written under a name of their own beside the place, then put into it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at ``path``: renamed to it at the end of the block, removed when the block fails."""
    aside = _aside(path)
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """The whole content of a file, as UTF-8."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def create_whole(path: Path, text: str) -> None:
    """As ``write_whole``, but a file that another rank made in the meantime stays."""
    aside = _aside(path)
    try:
        aside.write_text(text, encoding="utf-8")
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    # Random rather than this process's number: ranks on several machines may write into one folder.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
