"""What commands show: tables of text; and progress of long work, on stderr: a bar on a terminal, elsewhere a plain line after 45 s, and
then ever less often."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

ItemT = TypeVar("ItemT")
ProgressT = TypeVar("ProgressT", bound="Progress")
_FIRST_LINE, _MOST_BETWEEN = 45.0, 600.0
"""Seconds until a log gets its first line, and at most between two."""


class Progress:
    """Counts pieces of work, and says how long the rest takes.

    shown: None draws a bar on a terminal and writes lines elsewhere; True forces the bar, False silences both. Ranks other than 0
    say nothing. what: the work in one word. Of sampling, ``longest`` is the token limit of a sample: until the first one is
    finished, the tokens made so far bound the time that is left from above.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        shown: bool | None = None,
        rank: int = 0,
        what: str = "sampling",
        longest: int = 0,
    ) -> None:
        drawn = rank == 0 and (sys.stderr.isatty() if shown is None else shown)
        self._writes = rank == 0 and shown is None and not drawn
        self._total, self._done, self._new, self._what, self._longest = total, done, 0, what, longest
        self._start = time.monotonic()
        self._next_line = _FIRST_LINE
        self._tokens, self._note = 0, ""
        self._bar = RichProgress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(stderr=True),
            disable=not drawn,
            transient=what != "sampling" and sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(what, total=total, completed=done, said="")

    def made(self, num_tokens: int) -> None:
        """So many tokens were made."""
        self._tokens += num_tokens
        self._say()

    @property
    def done(self) -> int:
        """Pieces that are done."""
        return self._done

    def stored(self, number: int = 1, note: str = "") -> None:
        """So many more pieces are done; ``note``: what to say beside the time that is left."""
        self._note = note
        self._done += number
        self._new += number
        self._say()

    def _say(self) -> None:
        passed = time.monotonic() - self._start
        said = ", ".join(filter(None, [self._note, self.estimate(passed)]))
        self._bar.update(self._task, completed=self._done, said=said)
        if self._writes and passed >= self._next_line and self._done < self._total:
            self._next_line = passed + min(max(self._next_line, _FIRST_LINE), _MOST_BETWEEN)
            print(f"{self._what}: {self._done} of {self._total}, {said}", file=sys.stderr, flush=True)

    def estimate(self, passed: float) -> str:
        """Speed and the time that is left, after so many seconds of work."""
        passed = max(passed, 1e-9)
        speed = [f"{self._tokens / passed:,.0f} tokens/s"] if self._tokens else []
        rest = self._total - self._done
        if self._new:
            return ", ".join([*speed, f"about {duration(rest * passed / self._new)} left"])
        if self._tokens and self._longest:
            most = max(0, rest * self._longest - self._tokens)
            return ", ".join([*speed, f"at most {duration(most * passed / self._tokens)} left"])
        return ", ".join(speed)

    def __enter__(self: ProgressT) -> ProgressT:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def tracked(items: Iterable[ItemT], what: str, shown: bool | None = None, total: int | None = None) -> Iterator[ItemT]:
    """The items, with a bar while they are worked on. ``total``: their number, where they are no sequence."""
    listed: Sequence[ItemT] | Iterable[ItemT] = items if total is not None else list(items)
    with Progress(len(listed) if isinstance(listed, Sequence) else total or 0, shown=shown, what=what) as bar:
        for item in listed:
            yield item
            bar.stored()


def follow(what: str, rank: int = 0) -> Callable[[int, int], None]:
    """A callback ``(done, of)`` that shows the progress of work which reports it so; it ends with ``done == of``."""
    bar: Progress | None = None
    before = 0

    def watch(done: int, of: int) -> None:
        nonlocal bar, before
        if bar is None:
            bar = Progress(of, what=what, rank=rank).__enter__()
        bar.stored(done - before)
        before = done
        if done == of:
            bar.__exit__(None, None, None)

    return watch


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """A line for each row, its columns of one width: the first ``left`` begin below one another, the others end so.

    >>> aligned([["", "score"], ["nPMI", "1"]], left=1)
    ['      score', 'nPMI      1']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "sample"), counted(0, "expert"), counted(1200, "token")
    ('1 sample', '0 experts', '1200 tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> [duration(s) for s in (0, 59, 61, 3599, 7300, 200_000)]
    ['0 s', '59 s', '1 min', '60 min', '2 h 2 min', '55 h 33 min']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes <= 60 else f"{minutes // 60} h {minutes % 60} min"
