"""The jobs: each samples arms, compares them and reports. A finished one is read back from its folder, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.core.findings import RESULTS_FILE, Findings, publish, read_results
from moe_steer.json_files import short
from reasoning_evals.report import NOTHING_MORE, Rereading
from reasoning_evals.runs import read_run

JOBS = {
    "steer_r1": "launch.jobs.experts",
    "reduce_overthinking": "launch.jobs.overthinking",
    "safety": "launch.jobs.safety_job",
    "evaluate": "launch.jobs.evaluation",
}
"""Name in run.json, which is also that of the script -> the module that runs the job and reads it back."""
_OPTION_OF = {"gains": "steer_r1", "decision_strengths": "reduce_overthinking", "attack_tokens": "safety"}
"""An option that only this job has, for folders whose run.json does not name the job."""


def rebuild(folder: Path, asked: Rereading = NOTHING_MORE) -> str | None:
    """Grade again, write results.json and the pages; returns the summary, or None for a folder of anything else.

    ``asked``: what the page adds. ValueError for a folder without run.json, for a job that is not finished, and for what is asked
    of answers that a classifier judged.
    """
    name = _job_of(folder)
    if name is None:
        return None
    if name not in JOBS:
        raise ValueError(
            f"{folder} holds a run of the job {name!r}, which this version does not know: use the one it had"
        )
    if name == "safety" and asked != NOTHING_MORE:
        option = "--caps" if asked.caps else "--by-part"
        raise ValueError(f"{option} reads graded answers, and a classifier judged these whole: leave {option} out")
    try:
        findings: Findings = import_module(JOBS[name]).read(folder)
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder / 'run.json'}: {error}") from error
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


def _job_of(folder: Path) -> str | None:
    run = read_run(folder)
    if named := run.get("job"):
        return str(named)
    for option, name in _OPTION_OF.items():
        if option in run["config"]:
            return name
    return "evaluate" if _is_evaluation(folder, run) else None


def _is_evaluation(folder: Path, run: Mapping[str, Any]) -> bool:
    if not (folder / RESULTS_FILE).is_file():
        return False
    return "evaluate_options" in run or {"baseline", "arms", "sentences"} <= read_results(folder, "evaluate").keys()
