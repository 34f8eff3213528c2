"""Make thoughts shorter without losing answers: directions from the model's own answers, against the plain rivals.

    deepspeed launch/reduce_overthinking.py                        the embedded dense model, no argument needed
    deepspeed launch/reduce_overthinking.py --model lab            the embedded mixture-of-experts model
    deepspeed launch/reduce_overthinking.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --task gsm8k --sae SAE_FOLDER

Steps: sample unsteered answers; make directions from concise against verbose right thoughts (CAA, STA, all SAE atoms, one atom)
and from the decisions to stop or go on; choose layer and strength on tuning problems; compare all arms on test problems, by
accuracy, thinking tokens, truncation and repetition.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from functools import partial

from launch.core.ranks import Ranks, leave, start
from launch.jobs.overthinking_options import OverthinkingOptions


def run(options: OverthinkingOptions, ranks: Ranks) -> None:
    """The job, in the folder of the options. Its libraries are loaded only now: --help is quick."""
    from launch.jobs import overthinking

    overthinking.run(options, ranks)


main = partial(start, OverthinkingOptions, run, program="reduce_overthinking.py", description=__doc__)
"""Parse the arguments, run, report; returns the exit code."""

if __name__ == "__main__":
    leave(main())
