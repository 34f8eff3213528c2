"""``--help`` of every command, option by option, so that a difference names the option."""

from __future__ import annotations

import re
from pathlib import Path

from same.commands import run_command
from same.compare import Items

SCRIPTS = ("steer_r1.py", "reduce_overthinking.py", "safety.py", "evaluate.py", "collect_stats.py")
_DEFAULT = re.compile(r"\s*\((?:default: (?P<default>.*)|(?P<required>required))\)$")


def commands_of(overview: str) -> list[str]:
    """Names of the commands in the overview of ``moe-steer --help``: its indented lines."""
    return re.findall(r"^  ([a-z][a-z-]*)  ", overview, re.MULTILINE)


def help_items(work: Path) -> Items:
    """The overview, and one item a command."""
    overview = run_command("--help", work)
    items = {"help/overview": overview.text()}
    for name in (*SCRIPTS, *commands_of(overview.out)):
        done = run_command(f"{name} --help", work)
        items[f"help/{name}"] = f"exit code {done.code}\n{fields(done.out)}{done.err.strip()}"
    return items


def fields(text: str) -> str:
    """One line an option, sorted: names and type, default, help; then the usage line and the description.

    Positional arguments are options without dashes.
    """
    head, _, body = _split(text)
    rows: list[list[str]] = []
    for line in body:
        if line and not line[0].isspace():
            rows.append([part.strip() for part in re.split(r"  +", line, maxsplit=1)])
        elif line.strip() and rows:
            rows[-1].append(line.strip())
    options = sorted(_option(row[0], " ".join(row[1:])) for row in rows)
    return "\n".join([*options, "", *head, ""])


def _option(name: str, said: str) -> str:
    found = _DEFAULT.search(said)
    if found is None:
        return f"{name} | | {said}"
    default = "required" if found["required"] else f"default {found['default']}"
    return f"{name} | {default} | {_DEFAULT.sub('', said)}"


def _split(text: str) -> tuple[list[str], str, list[str]]:
    """The lines in front of the first frame, and those inside of any (already without the frame, see normalise)."""
    lines = text.split("\n")
    start = next((at for at, line in enumerate(lines) if re.match(r"-h, --help", line)), len(lines))
    head = [line for line in lines[:start] if not re.fullmatch(r"\w[\w ]*", line)]  # but for the frame's title
    return [" ".join(line.split()) for line in head if line.strip()], "", lines[start:]
