"""Items (name -> text) in a folder, and what differs between two sets of them. Knows nothing of what the items are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

Items = dict[str, str]
"""Name (words joined by /) -> text."""
LINES, WIDTH = 15, 240
"""The most that is shown of one difference: lines, and characters of a line."""
SUFFIX = ".txt"


@dataclass(frozen=True)
class Comparison:
    """Names of items, by what became of them; ``diffs``: name -> the lines to show."""

    equal: tuple[str, ...]
    diffs: dict[str, list[str]]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    expected: tuple[str, ...] = ()
    """Of the other three, those that were named as changed on purpose."""
    idle: tuple[str, ...] = field(default=())
    """Patterns of ``--changed`` that no difference needed."""

    @property
    def same(self) -> bool:
        """Whether nothing differs that was not named."""
        return not {*self.diffs, *self.new, *self.gone} - set(self.expected)

    def lines(self) -> list[str]:
        """What is printed: one line a difference, its diff below it, and the summary last."""
        shown = []
        for name, diff in self.diffs.items():
            shown += [f"DIFFERS {name}{self._mark(name)}", *(f"    {line}" for line in diff)]
        shown += [f"NEW     {name}{self._mark(name)}" for name in self.new]
        shown += [f"GONE    {name}{self._mark(name)}" for name in self.gone]
        shown += [f"--changed {pattern}: no item of that name differs" for pattern in self.idle]
        numbers = f"{len(self.equal)} items equal, {len(self.diffs)} differ, {len(self.new)} new, {len(self.gone)} gone"
        return [*shown, numbers]

    def _mark(self, name: str) -> str:
        return "   (changed on purpose)" if name in self.expected else ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the name, a folder above it, or a glob of either."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern.rstrip('/')}/*") for pattern in patterns)


def compare(old: Mapping[str, str], new: Mapping[str, str], changed: Sequence[str] = ()) -> Comparison:
    """``new`` against ``old``; differences of items that ``changed`` (globs) names are shown and forgiven."""
    both = sorted(old.keys() & new.keys())
    diffs = {name: short_diff(old[name], new[name]) for name in both if old[name] != new[name]}
    appeared, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    different = [*diffs, *appeared, *gone]
    return Comparison(
        equal=tuple(name for name in both if name not in diffs),
        diffs=diffs,
        new=tuple(appeared),
        gone=tuple(gone),
        expected=tuple(name for name in different if matches(name, changed)),
        idle=tuple(pattern for pattern in changed if not any(matches(name, [pattern]) for name in different)),
    )


def short_diff(old: str, new: str) -> list[str]:
    """At most ``LINES`` lines of the unified diff without context; of long lines the part around the first difference."""
    lines = list(difflib.unified_diff(old.split("\n"), new.split("\n"), "stored", "now", n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")] or lines
    shown = _around_the_difference(lines)[:LINES]
    if len(lines) > LINES:
        shown[-1] = f"... {len(lines) - LINES + 1} more lines differ"
    return shown


def _around_the_difference(lines: list[str]) -> list[str]:
    """Long lines cut. A removed line and the added one beside it are cut at the same place, just before they part."""
    removed = [line for line in lines if line.startswith("-")]
    added = [line for line in lines if line.startswith("+")]
    starts = {}
    for one, other in zip(removed, added, strict=False):
        common = next((at for at, (a, b) in enumerate(zip(one[1:], other[1:], strict=False)) if a != b), 0)
        starts[one] = starts[other] = max(0, common - 80)
    return [_cut(line, starts.get(line, 0)) for line in lines]


def _cut(line: str, start: int) -> str:
    if len(line) <= WIDTH:
        return line
    body = line[1 + start : 1 + start + WIDTH]
    return f"{line[0]}{'...' if start else ''}{body}{'...' if len(line) > 1 + start + WIDTH else ''}"


def write_items(folder: Path, items: Mapping[str, str]) -> None:
    """One text file an item."""
    for name, text in items.items():
        path = folder / f"{name}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))  # as bytes: a carriage return is a difference too


def read_items(folder: Path) -> Items:
    """What ``write_items`` wrote. FileNotFoundError for a folder that is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no store at {folder}: make one with 'python tests/same.py store {folder}'")
    return {
        path.relative_to(folder).as_posix().removesuffix(SUFFIX): path.read_bytes().decode("utf-8")
        for path in sorted(folder.rglob(f"*{SUFFIX}"))
    }
