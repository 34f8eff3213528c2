"""A progress line for a training: steps, error, dead atoms, time left. Silent off a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_steer.saes.training import TrainProgress


class TrainingProgress:
    """Hand it to ``train_sae`` as ``progress``. shown: None draws on a terminal; True and False force."""

    def __init__(self, steps: int, shown: bool | None = None) -> None:
        drawn = sys.stderr.isatty() if shown is None else shown
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("unexplained {task.fields[error]:.3f}, {task.fields[dead]} atoms dead"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not drawn,
        )
        self._task = self._bar.add_task("steps", total=steps, error=1.0, dead=0)

    def __call__(self, now: TrainProgress) -> None:
        self._bar.update(self._task, completed=now.step, error=now.error, dead=now.num_dead)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
