"""Wrong options, refused in one line. Beside an option it says what reads it, so that one function refuses idle ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints


class ReadBy(NamedTuple):
    """Parts of a run that follow an option. Where none of them takes part, a value other than the default is refused."""

    readers: tuple[str, ...]
    message: str = "--{option} is for {readers}: add one to {where}, or leave it out"
    where: str = ""
    """The option that names the parts, for the message."""


TASK = ReadBy(("task",), "--{option} {value} is for a task, and the lab makes its problems up: leave it out")
HERE = ReadBy(("model",), "--{option} is decided by the server: leave it out, and say it in --server")
DRAWING = ReadBy(("drawing",), "--{option} {value:g} would change nothing: the most likely token is taken at each step")

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


def refuse_greedy_samples(number: int | None, option: str = "--samples") -> None:
    """ValueError for more than one greedy answer to a problem."""
    if number not in (None, 1):
        raise ValueError(f"--greedy gives the same answer every time: leave {option} {number} out")


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


def check_names(field: str, given: Collection[str], known: Collection[str]) -> None:
    """ValueError for an unknown name, or one that is given twice."""
    for name in given:
        if name not in known:
            raise ValueError(f"{field} hold {name!r}: choose among {', '.join(known)}")
    if len(set(given)) != len(given):
        raise ValueError(f"{field} {list(given)} hold a name twice: give each once")


def check_numbers(command: Any, least: Mapping[str, int]) -> None:
    """ValueError for a number below the least that its option may have."""
    for name, lowest in least.items():
        if getattr(command, name) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(command, name)}: give a whole number >= {lowest}")


def check_folder(out: str) -> None:
    """ValueError when a folder to write to is a file."""
    if (place := Path(out)).exists() and not place.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
