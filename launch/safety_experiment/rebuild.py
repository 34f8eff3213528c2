"""A finished safety experiment, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.results_file import read_results
from launch.safety_experiment.arms import safety_arms
from launch.safety_experiment.directions import read_made
from launch.safety_experiment.findings import SafetyFindings
from launch.safety_experiment.options import SafetyOptions
from launch.safety_experiment.tasks import SafetyTask, judge
from launch.stored_options import options_from, stored_config
from moe_steer.directions import Direction
from reasoning_evals.problems import read_problems
from reasoning_evals.runs import PROBLEMS_FILE, GradeRow, read_grades


def findings_of(folder: Path) -> SafetyFindings:
    """Collect what the steps left; ValueError when the experiment is not finished.

    Capability tasks are graded again; the verdicts on attacks are kept, for only their classifiers could give others.
    """
    options = options_from(stored_config(folder), SafetyOptions, ["pairs_sha256", "sae_sha256"])
    told = read_results(folder, "safety.py")["tasks"]
    made = read_made(options, folder)
    tasks = [_task(name, told[name], folder) for name in options.tasks]
    return SafetyFindings(
        options=options,
        tasks=tasks,
        arms=safety_arms(options, made.files),
        rows={task.name: _rows(task, folder / task.name) for task in tasks},
        directions={arm: Direction.load(path).header for arm, path in made.files.items()},
        classifiers={task.name: told[task.name]["classifier"] for task in tasks if task.is_attack},
        sae_fit=made.fit,
        folder=folder,
        making=made.warnings,
    )


def _task(name: str, told: Mapping[str, Any], folder: Path) -> SafetyTask:
    return SafetyTask(
        name=name,
        problems=read_problems(folder / name / PROBLEMS_FILE),
        source=told["source"],
        max_new_tokens=told["max_new_tokens"],
        chat=told["asked"] == "chat template",
    )


def _rows(task: SafetyTask, folder: Path) -> list[GradeRow]:
    return read_grades(folder) if task.is_attack else judge(task, folder, None)
