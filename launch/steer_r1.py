"""The main job: find the experts that think, turn them up, and see whether it helped.

    deepspeed launch/steer_r1.py                                  the embedded model, no argument needed
    deepspeed --num_accelerators 2 launch/steer_r1.py             two processes share the work
    deepspeed launch/steer_r1.py --model PATH_OR_HUB_ID --preset rice-r1-math --problems problems.jsonl
    deepspeed launch/steer_r1.py ... --dry-run                    everything but loading weights

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from functools import partial

from launch.core.ranks import Ranks, leave, start
from launch.jobs.experts_options import Options


def run(options: Options, ranks: Ranks) -> None:
    """The job, in the folder of the options. Its libraries are loaded only now: --help is quick."""
    if options.dry_run:
        from launch import dry_run

        ranks.say(dry_run.report(options, ranks) if ranks.is_main else "")
        return
    from launch.jobs import experts

    experts.run(options, ranks)


main = partial(start, Options, run, program="steer_r1.py", description=__doc__)
"""Parse the arguments, run, report; returns the exit code."""

if __name__ == "__main__":
    leave(main())
