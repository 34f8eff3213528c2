"""The commands that README and docs show: where they stand, and how a test runs each of them in this process."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""The generated reference pages print the programs' own help."""
_FENCE = re.compile(r"^```(\w*)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    ((?:moe-steer|deepspeed|make|pip|python|srun|node-\w) ?.*)$", re.MULTILINE)
_MACHINE = re.compile(r"^(\d+) x [\w-]+ of ([\d.]+) GiB$")


class Shown(NamedTuple):
    """A command of a page, in the order of the page. ``note``: the comment behind it."""

    page: str
    command: str
    note: str
    live: bool
    """Whether it stands in a console block, which runs as it is."""

    @property
    def machine(self) -> tuple[str, str] | None:
        """GPUs and GiB of each, of a command that is shown for a machine with GPUs."""
        found = _MACHINE.match(self.note)
        return (found[1], found[2]) if found else None

    @property
    def refused(self) -> bool:
        """Whether the page says that it fails."""
        return self.note == "refused"


class File(NamedTuple):
    """A file whose content a page shows."""

    page: str
    name: str
    content: str


def blocks(page: Path) -> Iterator[Shown | File]:
    """Commands and files of a page, from top to bottom."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found: list[tuple[int, Shown | File]] = []
    for fence in _FENCE.finditer(text):
        if fence[2]:
            found.append((fence.start(), File(name, fence[2], fence[3])))
        for line in fence[3].splitlines() if fence[1] == "console" else ():
            assert line.startswith("$ "), f"{name}: {line!r} is no command"
            found.append((fence.start(), Shown(name, *_split(line[2:]), True)))
    outside = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for line in _INDENTED.finditer(outside):
        found.append((_offset(text, outside, line.start()), Shown(name, *_split(line[1]), False)))
    return iter(item for _, item in sorted(found, key=lambda one: one[0]))


def _offset(text: str, outside: str, place: int) -> int:
    """The place in the page of a place in the page without its blocks: by the number of its line."""
    number = outside.count("\n", 0, place)
    return sum(len(line) + 1 for line in text.split("\n")[:number])


def _split(line: str) -> tuple[str, str]:
    command, _, note = line.partition(" #")
    return command.rstrip(), note.strip()


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(command: str, folder: Path, *more: str) -> Done:
    """Run a command of ours in this process, which saves its imports, and anything else in a shell. ``more``: options added."""
    words = [*(_expanded(command) if "$(" in command else shlex.split(command)), *more]
    ours = words[0] in ("moe-steer", "deepspeed") or words[1:2] == ["-m"]
    here = os.getcwd()
    os.chdir(folder)
    out, err = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = _run(words) if ours else _shell(command)
    except SystemExit as end:
        code = int(end.code or 0) if isinstance(end.code, int) or end.code is None else 1
    finally:
        os.chdir(here)
    return Done(code, out.getvalue(), err.getvalue())


def _run(words: list[str]) -> int:
    if words[0] == "moe-steer":
        return int(import_module("launch.cli.main").main(words[1:]))
    if words[0] == "deepspeed":
        script = next(place for place, word in enumerate(words) if word.startswith("launch/"))
        return int(import_module(words[script][:-3].replace("/", ".")).main(words[script + 1 :]))
    return int(import_module(words[2]).main(words[3:]))


def _expanded(command: str) -> list[str]:
    """The words of a command in which the shell runs another one."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], env=_environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def _shell(command: str) -> int:
    return subprocess.run(["bash", "-c", command], env=_environment(), check=False).returncode


def _environment() -> dict[str, str]:
    """Of commands in a shell: this Python, and this code."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
