"""A list option that stands twice on a command line: the parser would keep the last list and drop the others without a word.
So would it with an option given under both of its names.

Of an option with one value the last one counts, as everywhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints


def refuse_repeated(program: str, options: type[Any], arguments: Sequence[str]) -> None:
    """Exit with 2, and one line on stderr, when a list among the fields of the dataclass ``options`` is given twice."""
    lists = {field.name for field in dataclasses.fields(options) if "tuple[" in str(field.type)}
    names = _other_names(options)
    seen: set[str] = set()
    given: dict[str, str] = {}
    for token in arguments:
        if token == "--":
            return
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if not token.startswith("--"):
            continue
        option = f"--{name.replace('_', '-')}"
        other = given.setdefault(names.get(option, name), option)
        if other != option:
            print(f"{program}: {other} and {option} are two names of one option: give one", file=sys.stderr)
            raise SystemExit(2)
        if name not in lists:
            continue
        if name in seen:
            print(f"{program}: {option} is given twice: give it once, with all its values behind it", file=sys.stderr)
            raise SystemExit(2)
        seen.add(name)


def _other_names(options: type[Any]) -> dict[str, str]:
    """Second name of an option -> its field."""
    hints = get_type_hints(options, include_extras=True)
    return {
        alias: field
        for field, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }
