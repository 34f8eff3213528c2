"""Steer a model away from harmful answers and see what it costs: the safety experiment of arXiv 2505.20322.

    deepspeed launch/safety.py --model google/gemma-2-9b-it --layer 20 --sae SAE_FOLDER --pairs SafeEdit_train.json \\
        --classifier zjunlp/SafeEdit-Safety-Classifier --data-dir DATA --out runs/safety

Arms: baseline, a prompt by hand, an automatic prompt, CAA, all SAE atoms, STA. Attacks: SafeEdit and the challenging
RealToxicityPrompts, judged by classifiers. Capability: GSM8K by this project's grader, MMLU by the letter of largest probability.
Recipes for published models: launch/configs/safety-*.json.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from functools import partial

from launch.core.ranks import Ranks, leave, start
from launch.jobs.safety_options import SafetyOptions


def run(options: SafetyOptions, ranks: Ranks) -> None:
    """The job, in the folder of the options. Its libraries are loaded only now: --help is quick."""
    from launch.jobs import safety_job

    safety_job.run(options, ranks)


main = partial(start, SafetyOptions, run, program="safety.py", description=__doc__)
"""Parse the arguments, run, report; returns the exit code."""

if __name__ == "__main__":
    leave(main())
