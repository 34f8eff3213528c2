"""Wrong options, refused in one line. Beside an option it says what reads it, so that one function refuses idle ones.

Also what a command line says before it is parsed: lists given twice, which the parser would shorten without a word, and names
that an option or a value had in an earlier version. Of an option with one value that is given twice the last value counts, as
everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints


class ReadBy(NamedTuple):
    """Parts of a run that follow an option. Where none of them takes part, a value other than the default is refused."""

    readers: tuple[str, ...]
    message: str = "--{option} is for {readers}: add one to {where}, or leave it out"
    where: str = ""
    """The option that names the parts, for the message."""


TASK = ReadBy(("task",), "--{option} {value} is for a task, and the lab makes its problems up: leave it out")
HERE = ReadBy(("model",), "--{option} is decided by the server: leave it out, and start the server with it")
DRAWING = ReadBy(("drawing",), "--{option} {value:g} would change nothing: the most likely token is taken at each step")

ENDPOINT = ReadBy(("endpoint",), "--{option} is for sampling over HTTP: give --endpoint, or leave it out")
ASKED = ReadBy(("endpoint", "engine"), "--{option} is for sampling over HTTP: give --endpoint, or leave it out")
ENGINE = ReadBy(("engine",), "--{option} is for a server that this start runs: give --engine, or leave it out")
PROMPTS = ReadBy(("prompts",), "--{option} is for prompts, and this run renders none: leave it out")


def refuse_idle(options: Any) -> None:
    """ValueError for an option that differs from its default and that nothing in the run would follow.

    Called when a user gives options, and not when those of a finished run are read back: another version may have stored
    what this one refuses.
    """
    notes = [
        (field, note)
        for field, hint in get_type_hints(type(options), include_extras=True).items()
        for note in getattr(hint, "__metadata__", ())
        if isinstance(note, ReadBy)
    ]
    for field, note in notes:
        value = getattr(options, field)
        if value != getattr(type(options), field) and not options.readers().intersection(note.readers):
            words = {"option": field.replace("_", "-"), "value": value, "options": options}
            raise ValueError(note.message.format(readers=", ".join(note.readers), where=note.where, **words))


def refuse_greedy_samples(number: int | None) -> None:
    """ValueError for more than one greedy answer to a problem."""
    if number not in (None, 1):
        raise ValueError(f"--greedy gives the same answer every time: leave --samples {number} out")


def named_files(given: Iterable[str], noun: str) -> dict[str, str]:
    """Name -> file, of files and NAME=FILE for the option --noun; ValueError for a name that is given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or "/" in name:
            name, file = Path(text).stem, text
        if name in found:
            raise ValueError(f"two {noun}s are named {name}: give one another name, as in --{noun} other={file}")
        found[name] = file
    return found


def layer_and_number(word: str, option: str) -> tuple[int, int]:
    """What ``LAYER:NUMBER`` names: an expert, or an atom. ValueError for anything else."""
    layer, colon, number = word.partition(":")
    if not colon or not layer.isdigit() or not number.isdigit():
        raise ValueError(f"--{option} {word!r}: write LAYER:{option[:-1].upper()}, for example 3:17")
    return int(layer), int(number)


def check_counts(options: Any, names: Collection[str]) -> None:
    """ValueError for a number below 1 among the named options; None means that it is not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give a whole number >= 1")


def check_num_problems(num_problems: int | None, name: str = "num_problems") -> None:
    """ValueError for fewer problems than a comparison needs."""
    if num_problems is not None and num_problems < 2:
        raise ValueError(f"{name} is {num_problems}: give at least 2, a comparison needs them")


def check_machine(options: Any) -> None:
    """ValueError for a machine that no dry run asks about, and for a dry run of what a server holds."""
    if options.held_by and options.dry_run:
        raise ValueError(
            f"--dry-run plans this start's memory, and the server of --{options.held_by} has its own: leave one out"
        )
    if (options.gpus is not None or options.gpu_gib is not None) and not options.dry_run:
        raise ValueError("--gpus and --gpu-gib describe a machine for --dry-run: give --dry-run too, or leave them out")
    if (options.gpus is None) != (options.gpu_gib is None):
        raise ValueError(f"--gpus is {options.gpus} and --gpu-gib {options.gpu_gib}: give both, or none")
    if options.gpus is not None and options.gpu_gib is not None and not (options.gpus >= 1 and options.gpu_gib > 0):
        raise ValueError(f"--gpus is {options.gpus} and --gpu-gib {options.gpu_gib:g}: give positive numbers")


def check_names(field: str, given: Collection[str], known: Collection[str]) -> None:
    """ValueError for an unknown name, or one that is given twice."""
    for name in given:
        if name not in known:
            raise ValueError(f"{field} hold {name!r}: choose among {', '.join(known)}")
    if len(set(given)) != len(given):
        raise ValueError(f"{field} {list(given)} hold a name twice: give each once")


def check_different(name: str, values: Collection[float], fits: Callable[[float], bool], wanted: str) -> None:
    """ValueError for no value, one that is given twice, and one that does not fit; ``wanted``: the values that do, in words."""
    if not values or len(set(values)) != len(values) or not all(map(fits, values)):
        raise ValueError(f"{name} are {list(values)}: give different {wanted}")


def check_strengths(name: str, values: Collection[float]) -> None:
    """ValueError unless they are different numbers that do something."""
    check_different(name, values, lambda value: value != 0 and isfinite(value), "numbers other than 0")


def check_numbers(command: Any, least: Mapping[str, int]) -> None:
    """ValueError for a number below the least that its option may have."""
    for name, lowest in least.items():
        if getattr(command, name) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(command, name)}: give a whole number >= {lowest}")


def check_finite(command: Any) -> None:
    """ValueError for NaN or an infinity among the values of a command's options."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, float) and not isfinite(one):
                raise ValueError(f"--{field.name.replace('_', '-')} is {one:g}: give a finite number")


def check_folder(out: str) -> None:
    """ValueError when a folder to write to is a file."""
    if (place := Path(out)).exists() and not place.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")


def check_out(out: str, *, one_file: bool) -> None:
    """ValueError for a place to write to that lies in a file, or that is a folder where ``one_file`` is written."""
    if one_file and Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    inside = next((place for place in Path(out).parents if place.exists()), Path())
    if not inside.is_dir():
        raise ValueError(f"--out {out} lies in {inside}, which is a file: name a place in a folder")


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
    unset = {field.name for field in dataclasses.fields(options) if field.default in (None, (), dataclasses.MISSING)}
    unset -= {"system", "scope"}  # the first may be empty, the other says what it takes
    for token, value in itertools.zip_longest(before_values, before_values[1:]):
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if not token.startswith("--"):
            continue
        option = f"--{name.replace('_', '-')}"
        if (value == "" or token.partition("=")[1:] == ("=", "")) and name in unset:
            _refuse(program, f"{option} has nothing behind it, as a variable that is not set leaves it: name something")
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
