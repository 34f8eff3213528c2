"""What a command says beside its result: warnings of the library as one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within it a UserWarning is one line "NOTE: ..." on stderr, each text once, without the place in the code."""
    said: set[str] = set()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                shown(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                print(f"NOTE: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = say
        yield


def check_numbers(command: Any, least: Mapping[str, int]) -> None:
    """ValueError for a number below the least that its option may have."""
    for name, lowest in least.items():
        if getattr(command, name) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(command, name)}: give a whole number >= {lowest}")


def check_folder(out: str) -> None:
    """ValueError when a folder to write to is a file."""
    if (place := Path(out)).exists() and not place.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
