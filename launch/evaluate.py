"""Compare ways to control reasoning on one model and one task: steering plans, prompts, decoding rules.

    deepspeed launch/evaluate.py                                   the embedded model, RICE's baselines
    deepspeed launch/evaluate.py --arms baseline plan:plan.json tip nowait budget:64 prompt-before prompt-after
    deepspeed --num_accelerators 2 launch/evaluate.py --model PATH_OR_HUB_ID --problems aime2024 --samples 16

An arm is one of the words that --arms lists below, or several of them joined by +. All arms are compared with the baseline (without one: with the first arm).

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from functools import partial

from launch.core.ranks import leave, start
from launch.jobs.evaluation import EvaluateOptions, run

main = partial(start, EvaluateOptions, run, program="evaluate.py", description=__doc__)
"""Parse the arguments, run, report; returns the exit code."""

if __name__ == "__main__":
    leave(main())
