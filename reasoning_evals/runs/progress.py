"""A progress bar: samples, tokens per second, time left. Shown on a terminal and on rank 0 only."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts samples stored and tokens made.

    shown: None draws on a terminal only; True and False force it. Ranks other than 0 never draw. what: the work in one
    word; for work other than sampling no tokens are counted, and the bar disappears at the end.
    """

    def __init__(
        self, num_samples: int, num_done: int, shown: bool | None = None, rank: int = 0, what: str = "sampling"
    ) -> None:
        console = Console(stderr=True)
        drawn = rank == 0 and (sys.stderr.isatty() if shown is None else shown)
        self._start = time.monotonic()
        self._tokens = 0
        samples = what == "sampling"
        self._bar = RichProgress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            *([TextColumn("{task.fields[rate]:,.0f} tokens/s")] if samples else []),
            TimeRemainingColumn(),
            console=console,
            disable=not drawn,
            transient=not samples,
        )
        self._task = self._bar.add_task("samples", total=num_samples, completed=num_done, rate=0.0)

    def sampled(self, num_tokens: int) -> None:
        """A sample of so many tokens was made."""
        self._tokens += num_tokens
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._task, rate=rate)

    def stored(self) -> None:
        """A sample is on disk."""
        self._bar.advance(self._task)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
