"""A graded run folder as input of the exports: problems with their samples and verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from moe_steer.json_files import quoted
from reasoning_evals.comparing import cluster_names, mean_estimate
from reasoning_evals.problems import Problem
from reasoning_evals.runs import (
    ArmThoughts,
    Completion,
    GradeRow,
    grade_run,
    read_generations,
    read_run,
    refuse_job,
    run_problems,
    run_thoughts,
)
from reasoning_evals.tasks import SPECS
from reasoning_evals.thinking import Thought


class ProblemSamples(NamedTuple):
    """A problem and its k samples in one arm, by sample number."""

    place: int
    """0-based, in the order of the run."""
    problem: Problem
    samples: tuple[tuple[Completion, GradeRow], ...]


@dataclass(frozen=True, slots=True)
class GradedRun:
    """Verdicts are in memory; texts are read one arm at a time."""

    folder: Path
    config: Mapping[str, Any]
    created: datetime
    """UTC."""
    versions: Mapping[str, str]
    commit: str | None
    problems: tuple[Problem, ...]
    grades: Mapping[tuple[str, str, int], GradeRow]
    readers: Mapping[str, ArmThoughts]
    """Arm -> how its texts are split."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.config["task"])

    @property
    def k(self) -> int:
        """Samples a problem."""
        return int(self.config["k"])

    @property
    def arms(self) -> tuple[str, ...]:
        """Names, in the order of the run."""
        return tuple(self.config["arm_order"])

    @property
    def file_names(self) -> dict[str, str]:
        """A file name for each arm; arms whose names would give the same one are numbered."""
        names: dict[str, str] = {}
        for arm in self.arms:
            name, number = file_name(arm), 2
            while name.casefold() in {taken.casefold() for taken in names.values()}:
                name, number = f"{file_name(arm)}-{number}", number + 1
            names[arm] = name
        return names

    def model(self, arm: str) -> str:
        """The model's name, as the arm's sampler gives it."""
        return str(self.config["arms"][arm]["sampler"].get("model") or "unknown")

    def thought(self, completion: Completion) -> Thought:
        """Thought and answer of a sample, split as in grading."""
        return self.readers[completion.arm].split(completion.text, completion.prompt)

    def samples(self, arm: str) -> Iterator[ProblemSamples]:
        """By problem, in the order of the run. Loads the texts of one arm."""
        completions = {(one.problem_id, one.sample_idx): one for one in read_generations(self.folder) if one.arm == arm}
        for place, problem in enumerate(self.problems):
            keys = [(problem.problem_id, j) for j in range(self.k)]
            yield ProblemSamples(place, problem, tuple((completions[key], self.grades[(arm, *key)]) for key in keys))

    @property
    def clusters(self) -> list[str] | None:
        """One cluster per problem, or None when no two problems share one."""
        return cluster_names({one.problem_id: one.cluster_id for one in self.problems})

    def standard_error(self, values_P: Sequence[float]) -> float | None:
        """Standard error of the mean over problems; None for a single problem or cluster."""
        groups = self.clusters or [problem.problem_id for problem in self.problems]
        return mean_estimate(values_P, self.clusters).se if len(set(groups)) > 1 else None

    def correct(self, arm: str) -> list[list[bool]]:
        """Whether each sample is correct, [problems][samples]."""
        return [[self.grades[arm, one.problem_id, j].correct for j in range(self.k)] for one in self.problems]


def open_graded_run(folder: Path | str, private: bool = False) -> GradedRun:
    """Grade a finished run and load it. ``private``: the export stays with people who may see the questions.

    ValueError when samples are missing, or when the task's authors ask not to publish its questions and ``private`` is not
    set.
    """
    path = Path(folder)
    run = read_run(path)
    refuse_job(path)
    task = str(run["config"]["task"])
    problems = tuple(run_problems(path))
    if not private and (name := _closed_task(task, problems)):
        raise ValueError(
            f"the questions of {name} are not to be published, and an export holds them: set private if it stays with you"
        )
    rows = grade_run(path, problems)
    try:
        created = datetime.fromisoformat(run["created"]).astimezone(timezone.utc)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{path / 'run.json'} says {quoted(run.get('created'))} as the time it was created: restore the file"
        ) from None
    return GradedRun(
        folder=path,
        config=run["config"],
        created=created,
        versions=run.get("versions", {}),
        commit=run.get("commit"),
        problems=problems,
        grades={(row.arm, row.problem_id, row.sample_idx): row for row in rows},
        readers=run_thoughts(run["config"]),
    )


def _closed_task(task: str, problems: tuple[Problem, ...]) -> str | None:
    """The data set of a run whose authors ask not to publish it; recognised by the problem ids too, since a run may have
    its own task name."""
    for name, spec in SPECS.items():
        mine = task == name or any(problem.problem_id.startswith(f"{spec.family}-") for problem in problems)
        if mine and not spec.publish_items:
            return name
    return None


def clean(text: str) -> str:
    """Replace lone surrogates, which broken model output may contain, by U+FFFD: parquet and JSON readers refuse them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def file_name(text: str) -> str:
    """The text as a file name that is safe on every file system."""
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "_"
