"""A job on every rank, where rank 1 needs longer for its share than a rank waits for one that writes nothing.

Usage: uneven_worker.py FOLDER JOB, on every rank. FOLDER holds jobs.json: name of the module in launch.jobs -> options.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from launch.core.ranks import leave, ranks_of_this_run
from reasoning_evals.engines import in_process

OPTIONS = {
    "experts": "launch.jobs.experts_options:Options",
    "overthinking": "launch.jobs.overthinking_options:OverthinkingOptions",
    "evaluation": "launch.jobs.evaluation:EvaluateOptions",
    "safety_job": "launch.jobs.safety_options:SafetyOptions",
}
SLOW_SAMPLES, SECONDS = 6, 3.0
"""The first samples of rank 1, and what each takes: longer together than MOE_STEER_WAIT_SECONDS of the test."""


def slow_down() -> None:
    """The first SLOW_SAMPLES samples of this process take SECONDS each."""
    fast = in_process.InProcessSampler.sample
    left = SLOW_SAMPLES

    def sample(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal left
        for made in fast(self, *arguments, **options):
            if left > 0:
                left -= 1
                time.sleep(SECONDS)
            yield made

    in_process.InProcessSampler.sample = sample  # type: ignore[method-assign]


def main(folder: Path, name: str) -> int:
    """Run the job; rank 0 says when it is done."""
    if os.environ["RANK"] == "1":
        slow_down()
    arguments = json.loads((folder / "jobs.json").read_text())[name]
    module, _, kind = OPTIONS[name].partition(":")
    options = tyro.cli(getattr(import_module(module), kind), args=[*arguments, "--out", str(folder / name)])
    with ranks_of_this_run() as ranks:
        import_module(f"launch.jobs.{name}").run(options, ranks)
        ranks.say(f"DONE {name}")
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2]))
