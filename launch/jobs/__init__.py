"""The jobs: each samples arms, compares them and reports. A finished one is read back from its folder, without a model."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from launch.core.findings import Findings, publish
from moe_steer.json_files import quoted, short
from reasoning_evals.report import NOTHING_MORE, Rereading
from reasoning_evals.runs import read_run

JOBS = {
    "steer_r1": "launch.jobs.experts",
    "reduce_overthinking": "launch.jobs.overthinking",
    "safety": "launch.jobs.safety_job",
    "evaluate": "launch.jobs.evaluation",
}
"""Name in run.json, which is also that of the script -> the module that runs the job and reads it back."""


def rebuild(folder: Path, asked: Rereading = NOTHING_MORE) -> str | None:
    """Grade again, write results.json and the pages; returns the summary, or None for a folder of anything else.

    ``asked``: what the page adds. ValueError for a folder without run.json, for a job that is not finished, and for what is asked
    of answers that a classifier judged.
    """
    name = read_run(folder).get("job")
    if name is None:
        return None
    if not isinstance(name, str) or name not in JOBS:
        raise ValueError(
            f"{folder} holds a run of the job {quoted(name)}, which this version does not know: use the one it had"
        )
    if name == "safety" and asked != NOTHING_MORE:
        option = "--caps" if asked.caps else "--by-part"
        raise ValueError(f"{option} reads graded answers, and a classifier judged these whole: leave {option} out")
    try:
        findings: Findings = import_module(JOBS[name]).read(folder)
    except ValueError as error:
        named = any(word == str(folder) or word.startswith(f"{folder}/") for word in re.split(r"[\s:]+", str(error)))
        raise error if named else ValueError(f"{folder / 'run.json'}: {error}") from error
    except (
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:  # a file that no job wrote so
        raise ValueError(
            f"{folder} holds the files of a job that were changed ({short(repr(error))}): restore them, or start the job again"
        ) from error
    return publish(findings, asked)
