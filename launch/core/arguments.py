"""What a command line says before it is parsed: lists given twice, which the parser would shorten without a word, and names
that an option or a value had in an earlier version.

Of an option with one value that is given twice the last value counts, as everywhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints


def refuse_misread(program: str, options: type[Any], arguments: Sequence[str]) -> None:
    """Exit with 2, and one line on stderr, for arguments that the parser of the dataclass ``options`` would misread.

    Its ``renamed`` (old -> new) holds options, as ``--old``, and values, as ``--option old``.
    """
    before_values = arguments[: arguments.index("--")] if "--" in arguments else arguments
    _refuse_renamed(program, getattr(options, "renamed", {}), before_values)
    lists = {field.name for field in dataclasses.fields(options) if "tuple[" in str(field.type)}
    lists -= getattr(options, "repeatable", frozenset())
    names = _other_names(options)
    seen: set[str] = set()
    given: dict[str, str] = {}
    for token in before_values:
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if not token.startswith("--"):
            continue
        option = f"--{name.replace('_', '-')}"
        other = given.setdefault(names.get(option, name), option)
        if other != option:
            _refuse(program, f"{other} and {option} are two names of one option: give one")
        if name not in lists:
            continue
        if name in seen:
            _refuse(program, f"{option} is given twice: give it once, with all its values behind it")
        seen.add(name)


def _refuse_renamed(program: str, renamed: dict[str, str], arguments: Sequence[str]) -> None:
    option = ""
    for token in arguments:
        if token.startswith("--"):
            option = token.partition("=")[0]
            old = option
        else:
            old = f"{option} {token}"
        if old in renamed:
            _refuse(program, f"{old} is now called {renamed[old]}")


def _refuse(program: str, why: str) -> NoReturn:
    print(f"{program}: {why}", file=sys.stderr)
    raise SystemExit(2)


def _other_names(options: type[Any]) -> dict[str, str]:
    """Second name of an option -> its field."""
    hints = get_type_hints(options, include_extras=True)
    return {
        alias: field
        for field, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }
