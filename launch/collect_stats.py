"""Which experts think: traces through a model to counts, scores and pictures, in one folder.

    deepspeed launch/collect_stats.py --traces runs/lab/identification --out runs/lab-stats
    deepspeed --num_gpus 8 launch/collect_stats.py --model PATH_OR_HUB_ID --traces traces.jsonl --out runs/stats

The traces are taken in parts, each of which leaves its counts behind: stopped and started again, it goes on with the first
part that is missing, on any number of ranks.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from functools import partial

from launch.core.ranks import leave, start
from launch.jobs.stats import CollectOptions, run

main = partial(start, CollectOptions, run, program="collect_stats.py", description=__doc__)
"""Parse the arguments, run, report; returns the exit code."""

if __name__ == "__main__":
    leave(main())
