"""Files that appear whole or not at all: written under a name of their own beside the place, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
