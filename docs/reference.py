"""Hook of mkdocs: a reference page for every command, from its own ``--help``, and one for every room, from its public names."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
SCRIPTS = {
    "steer_r1.py": "The main job: find the experts that think, turn them up, and see whether it helped.",
    "reduce_overthinking.py": "Make thoughts shorter without losing answers.",
    "safety.py": "The safety experiment of STA's paper.",
    "evaluate.py": "Compare plans, prompts and decoding rules, arm by arm.",
    "collect_stats.py": "Traces to routing counts, scores and pictures.",
}
ROOMS = {
    "moe_steer": "Changes models: load, steer, observe, bake.",
    "expert_stats": "Measures routing: count, score, select.",
    "reasoning_evals": "Judges text: tasks, grades, comparisons.",
}


def commands() -> dict[str, str]:
    """Name -> what it prints on --help, at the width of a page."""
    from launch.cli.main import COMMANDS, JOBS, main

    os.environ["COLUMNS"], os.environ["TERM"] = "108", "dumb"
    return {
        **{f"moe-steer {name}": _help(main, [name, "--help"]) for name in (*COMMANDS, *JOBS)},
        **{script: _help(import_module(f"launch.{script[:-3]}").main, ["--help"]) for script in SCRIPTS},
    }


def _help(main: Any, arguments: list[str]) -> str:
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        main(arguments)
    return said.getvalue()


def command_page(name: str, text: str) -> str:
    """The page: usage, what the command does, its options group by group."""
    usage, _, rest = text.partition("\n\n")
    about, *groups = re.split(r"^ (\w[\w -]*?) *\n -+ *$", rest, flags=re.MULTILINE)
    if not groups:
        raise ValueError(f"the help of {name} has another form than this page reads: {text[:300]!r}")
    about = about.strip() if name.startswith("moe-steer") else SCRIPTS[name]
    parts = [f"# {name}", _plain(about), f"```text\n{usage}\n```"]
    for title, group in zip(groups[::2], groups[1::2], strict=True):
        rows = [f"| <code>{_cell(escape(option))}</code> | {_plain(_cell(said))} |" for option, said in _options(group)]
        parts += [f"## {title.capitalize()}", "\n".join(["| option | meaning |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _options(group: str) -> list[tuple[str, str]]:
    """Option, and what is said of it: on the same line, or on the lines that stand further right."""
    found: list[list[str]] = []
    for line in filter(str.strip, group.split("\n")):
        if re.match(r"  \S", line):
            found.append([part.strip() for part in re.split(r"  +", line.strip(), maxsplit=1)])
        else:
            found[-1].append(line.strip())
    return [(option, " ".join(said)) for option, *said in found]


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")


def _plain(text: str) -> str:
    """Text whose tags are shown, not read."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def room_page(room: str) -> str:
    """The page of a room: every public name, by the module that defines it (the door only points there)."""
    stub = (ROOT / room / "__init__.pyi").read_text(encoding="utf-8")
    names = re.findall(r"^from ([\w.]+) import (\w+) as \w+$", stub, re.MULTILINE)
    parts = [f"# {room}", ROOMS[room], f"All of these are imported as `from {room} import NAME`."]
    return "\n\n".join([*parts, *(f"::: {_home(module, name)}" for module, name in names)]) + "\n"


def _home(module: str, name: str) -> str:
    """Where a name is defined: doors lead to doors."""
    found = ROOT / Path(*module.split("."), "__init__.pyi")
    if found.is_file() and (line := re.search(rf"^from ([\w.]+) import {name} as", found.read_text(), re.MULTILINE)):
        return _home(line[1], name)
    return f"{module}.{name}"


def _path(name: str) -> str:
    if name.endswith(".py"):
        return f"reference/launch/{name[:-3]}.md"
    return f"reference/{name.removeprefix('moe-steer ')}.md"


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, and keep what they hold."""
    config.extra["generated"] = {
        **{_path(n): command_page(n, text) for n, text in commands().items()},
        **{f"reference/python/{room}.md": room_page(room) for room in ROOMS},
    }
    pages = list(config.extra["generated"])
    config.nav.append({"Commands": [page for page in pages if "/python/" not in page]})
    config.nav.append({"Python": [page for page in pages if "/python/" in page]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in config.extra.pop("generated").items():
        files.append(File.generated(config, path, content=text))
    return files
