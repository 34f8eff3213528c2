"""Which experts think: traces through a model to counts, scores and pictures, in one folder.

    deepspeed launch/collect_stats.py --traces runs/lab/identification --out runs/lab-stats
    deepspeed --num_gpus 8 launch/collect_stats.py --model PATH_OR_HUB_ID --traces traces.jsonl --out runs/stats

The traces are taken in parts, each of which leaves its counts behind: stopped and started again, it goes on with the first
part that is missing, on any number of ranks.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.core.ranks import Ranks, leave
from launch.core.start import start
from launch.jobs.stats import CollectOptions


def run(options: CollectOptions, ranks: Ranks) -> None:
    """The job, in the folder of the options. Its libraries are loaded only now: --help is quick."""
    from launch.jobs import stats

    stats.run(options, ranks)


def main(argv: Sequence[str] | None = None, program: str = "collect_stats.py") -> int:
    """Parse, run, report; returns the exit code."""
    return start(CollectOptions, run, argv, program, __doc__)


if __name__ == "__main__":
    leave(main())
