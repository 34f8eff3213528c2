"""What may differ between two runs of the same sources, taken out of their output. Every rule says why it is there.

No rule touches a number of a result: times, paths and versions are replaced where they are known to stand.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ABOUT_THE_START = ("commit", "created", "hardware", "history", "versions")
"""Of run.json, beside its config: when, where and with which versions it was started."""

_LAUNCHER = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] \[(INFO|WARNING)\] .*$")
"""The launcher's own log: times, process numbers, paths."""
_PROGRESS = re.compile(r"\r|\d+%\||^[a-z ]+: \d+ of \d+, .* left$")
"""Progress, as a bar or a line: speeds and times."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")
"""Addresses in memory, in the names that Python gives to objects."""
_SPEED = re.compile(r"\b[\d,.]+ tokens/s\b")
"""What ``moe-steer generate`` says about the machine."""
_STAMP = re.compile(r"(?<!\d)\d{4}-\d\d-\d\dT\d\d[-:]\d\d[-:]\d\d")
"""When a run was made, in the names and the contents of exported files."""
_DATE = re.compile(r'("date": )\d{10}\.\d+')
"""When a run was exported for lm-eval, in seconds since 1970."""
_COMMIT = re.compile(r"(\bcommit\b(?:&#\d+;|[^\w&])*)[0-9a-f]{40}\b(?:-dirty)?")
_VERSION = re.compile(r"(\bmoe-steer(?:&#34;|\"): (?:&#34;|\"))\d[\w.]*")
"""The state of the sources, which pages repeat from run.json, as text or escaped."""
_RULE = re.compile(r"^[╭╰├─╌][─╌ ]*|[─╌ ]*[╮╯┤]$")
"""Frames around an error of the options: their width is the terminal's."""

_LINE = re.compile(r"─+")
_CLASS = re.compile(r"(?<=^Error parsing )[A-Z]\w*(?=:)")
"""The class that holds the options, which the parser names and no user knows."""


def text_of(output: str, work: Path) -> str:
    """What a program printed: without the launcher's log, progress bars, frames, and with names for absolute paths."""
    for path, name in ((work, "<work>"), (work.resolve(), "<work>"), (ROOT, "<repo>"), (Path(sys.prefix), "<python>")):
        output = output.replace(str(path), name)
    lines = [line for line in output.split("\n") if not _LAUNCHER.match(line) and not _PROGRESS.search(line)]
    lines = [_line(line) for line in lines]
    return "\n".join(line for line in lines if not _LINE.fullmatch(line)).strip() + "\n"


def _line(line: str) -> str:
    """One line without what belongs to this start or to the terminal."""
    line = _SPEED.sub("<speed> tokens/s", _STAMP.sub("<time>", _ADDRESS.sub("<address>", line)))
    line = _VERSION.sub(r"\1<version>", _COMMIT.sub(r"\1<commit>", line))
    line = _DATE.sub(r"\1<time>", line)
    return _CLASS.sub("<options>", _unframed(line))


def _unframed(line: str) -> str:
    line = _RULE.sub("", line)
    return line.removeprefix("│ ").rstrip("│ ") if line.startswith("│") else line.rstrip()


def json_text(values: Any) -> str:
    """JSON with one value a line and sorted keys, so that a diff names what changed."""
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def file_text(path: Path, work: Path) -> str:
    """One file of a run: texts as they are, JSON with sorted keys, anything else by its hash.

    run.json without what says when and where it was started.
    """
    data = path.read_bytes()
    if path.suffix == ".json":
        values = json.loads(data)
        if path.name == "run.json":
            values = {key: value for key, value in values.items() if key not in ABOUT_THE_START}
        if path.name.endswith("steering.json"):
            values = record_of_a_bake(values)
        return text_of(json_text(values), work)
    if path.suffix == ".pt":
        return _tensor_text(path)
    if path.suffix in (".md", ".html", ".svg", ".txt", ".csv"):
        return text_of(data.decode("utf-8"), work)
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n"


def record_of_a_bake(values: dict[str, Any]) -> Any:
    """steering.json without the times of the source's files, which is made anew in each run, and without its own checksum,
    which covers them."""
    return _timeless({key: value for key, value in values.items() if key != "sha256"})


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key != "mtime_ns"}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _tensor_text(path: Path) -> str:
    """A tensor saved by torch, by its values: the file around them holds a number drawn at random."""
    import torch

    tensor = torch.load(path, weights_only=True)
    digest = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {list(tensor.shape)}, sha256 of the values {digest}\n"


def lines_text(paths: list[Path]) -> str:
    """The lines of several .jsonl files, sorted: ranks write in the order in which they finish. By arm: number and hash."""
    by_arm: dict[str, list[bytes]] = {}
    for path in paths:
        for line in path.read_bytes().splitlines():
            by_arm.setdefault(str(json.loads(line).get("arm", "all")), []).append(line)
    rows = []
    for arm, lines in sorted(by_arm.items()):
        digest = hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()
        rows.append(f"{arm}: {len(lines)} lines, sha256 {digest}")
    return "\n".join(rows) + "\n"


def folder_items(folder: Path, work: Path) -> dict[str, str]:
    """Every file below a run's folder, by its relative name; .jsonl files of several ranks as one."""
    items: dict[str, str] = {}
    lines: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = _STAMP.sub("<time>", path.relative_to(folder).as_posix())
        if path.suffix == ".jsonl":
            lines.setdefault(re.sub(r"\.rank\d+\.jsonl$", ".jsonl", name), []).append(path)
        else:
            items[name] = file_text(path, work)
    return items | {name: lines_text(paths) for name, paths in lines.items()}
