"""Compare ways to control reasoning on one model and one task: steering plans, prompts, decoding rules.

    deepspeed launch/evaluate.py                                   the embedded model, RICE's baselines
    deepspeed launch/evaluate.py --arms baseline plan:plan.json tip nowait budget:64 prompt-before prompt-after
    deepspeed --num_accelerators 2 launch/evaluate.py --model PATH_OR_HUB_ID --problems aime2024 --samples 16

An arm is baseline, plan:FILE, preset:NAME, prompt-before, prompt-after, tip[:ALPHA,BETA], tip-close[:ALPHA,BETA], nowait, budget:N,
or several of them joined by +. All arms are compared with the baseline (without one: with the first arm).

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.core.ranks import Ranks, leave
from launch.core.start import start
from launch.jobs.evaluation import EvaluateOptions


def run(options: EvaluateOptions, ranks: Ranks) -> None:
    """The job, in the folder of the options. Its libraries are loaded only now: --help is quick."""
    from launch.jobs import evaluation

    evaluation.run(options, ranks)


def main(argv: Sequence[str] | None = None, program: str = "evaluate.py") -> int:
    """Parse, run, report; returns the exit code."""
    return start(EvaluateOptions, run, argv, program, __doc__)


if __name__ == "__main__":
    leave(main())
