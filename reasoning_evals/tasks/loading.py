"""Problems of a task by name: a data set, a user's own file, or a generator that a package registers as an entry point."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moe_steer.json_files import check_types
from reasoning_evals.problems import Problem, asked_once, check_unique
from reasoning_evals.tasks.competition import AIME, GSM8K, MATH500, OLYMPIADBENCH
from reasoning_evals.tasks.harm import REAL_TOXICITY, SAFEEDIT
from reasoning_evals.tasks.letters import GPQA, MMLU, MMLU_PRO
from reasoning_evals.tasks.own_file import find_files, is_file_name, load_own_file, read_rows
from reasoning_evals.tasks.science import PHYBENCH, PHYSICS, SCIBENCH, THEOREMQA, TPBENCH, UGPHYSICS
from reasoning_evals.tasks.spec import ANY, R1_PROMPT, Row, TaskSpec, ask

_DATA_SETS = (
    *AIME, *MATH500, *GSM8K, *OLYMPIADBENCH, *GPQA, *MMLU_PRO, *SCIBENCH, *UGPHYSICS, *PHYBENCH, *TPBENCH, *PHYSICS, *THEOREMQA,
    *MMLU, *SAFEEDIT, *REAL_TOXICITY,
)  # fmt: skip
SPECS: dict[str, TaskSpec] = {spec.name: spec for spec in _DATA_SETS}
GYM = "reasoning_gym"

GROUP = "reasoning_evals.tasks"
GYM_TYPES: dict[str, tuple[str, float | None]] = {
    "basic_arithmetic": ("integer", None),
    "chain_sum": ("integer", None),
    "complex_arithmetic": ("expression", None),
    "count_primes": ("integer", None),
    "decimal_arithmetic": ("number", 1e-9),
    "decimal_chain_sum": ("number", 0.0),
    "gcd": ("integer", None),
    "gsm_symbolic": ("integer", None),
    "lcm": ("integer", None),
    "leg_counting": ("integer", None),
    "number_sequence": ("integer", None),
    "products": ("integer", None),
    "simple_equations": ("integer", None),
    "simple_geometry": ("number", 0.0),
    "simple_integration": ("expression", None),
}
"""The sets of reasoning-gym that our graders can judge, with answer type and tolerance. Its own scorers accept wrong
answers (coin_flip accepts "0" in most problems), so they are not used."""


def load_task(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    num: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Problem]:
    """The problems of a task.

    ``name`` is a data set (see ``task_names``), a generated task, or the path of a file of problems. ``data_dir`` is a local
    file or folder in the data set's own format; without it the data set comes from the hub at a fixed ``revision``.
    ``num`` problems are drawn without repetition, decided by ``seed`` and each problem's id alone; generators receive both.
    Options: ``revision``, ``config``, ``prompt`` (template with ``{problem}``) for data sets; ``columns``, ``answer_type``,
    ``unit``, ``tolerance``, ``prompt`` for a file; ``overrides`` (problem_id -> right target, for errors in the published
    ones) for both; those of the generator for a generated task. Problems with the same text share a cluster. ValueError for names,
    options and files that do not fit; never fewer problems than asked.
    """
    if num is not None and num < 1:
        raise ValueError(f"num is {num}: expected 1 or more problems, or None for all")
    generators = entry_point_tasks()
    if name in generators:
        given = {"split": split, "num": num, "seed": seed, **options}
        return _checked(
            name, load_entry_point(generators[name], {k: v for k, v in given.items() if v is not None}), num
        )
    if name == GYM:
        return _checked(name, load_gym(num=num, seed=seed, **options), num)
    if name in SPECS:
        corrections = options.pop("overrides", {})
        problems = _load_data_set(SPECS[name], data_dir, split, options)
        return draw(name, _corrected(name, problems, corrections), num, seed)
    if is_file_name(name):
        corrections = options.pop("overrides", {})
        _refuse_unknown(name, options, {"columns", "answer_type", "unit", "tolerance", "prompt"})
        problems = _checked(name, load_own_file(name, **options), None)
        return draw(name, _corrected(name, problems, corrections), num, seed)
    raise ValueError(
        f"unknown task {name!r}: expected one of {', '.join(task_names())}, or the path of a file of problems"
    )


def task_names() -> list[str]:
    """Names of all data sets and generated tasks."""
    return [*SPECS, *sorted(entry_point_tasks()), GYM]


def task_spec(name: str) -> TaskSpec:
    """The description of a data set: source, prompt, sampling. ValueError for unknown names."""
    if name not in SPECS:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(SPECS)}")
    return SPECS[name]


def draw(name: str, problems: list[Problem], num: int | None, seed: int) -> list[Problem]:
    """``num`` of the problems in their own order; the choice depends on seed and ids, not on the order of the file."""
    if num is None:
        return problems
    if num > len(problems):
        raise ValueError(f"task {name!r} has {len(problems)} problems, {num} were asked for")
    ranked = sorted(problems, key=lambda problem: hashlib.sha256(f"{seed}/{problem.problem_id}".encode()).digest())
    chosen = {problem.problem_id for problem in ranked[:num]}
    return [problem for problem in problems if problem.problem_id in chosen]


def _load_data_set(
    spec: TaskSpec, data_dir: str | os.PathLike[str] | None, split: str | None, options: dict[str, Any]
) -> list[Problem]:
    _refuse_unknown(spec.name, options, {"revision", "config", "prompt"})
    config = options.get("config", spec.config)
    split = split or spec.split
    if data_dir is not None:
        name = spec.file_name.format(split=split) if spec.file_name else None
        files = find_files(Path(data_dir), spec.family, split, config, name)
        rows: Iterable[tuple[str, Row]] = (row for path in files for row in read_rows(path))
    else:
        rows = _hub_rows(spec, config, split, options.get("revision", spec.revision))
    problems = list(_problems(spec, rows, options.get("prompt", spec.prompt)))
    if not problems:
        raise ValueError(f"task {spec.name!r}: no row of split {split!r} is a problem of it")
    return _checked(spec.name, _distinct(problems), None)


def _problems(spec: TaskSpec, rows: Iterable[tuple[str, Row]], prompt: str) -> Iterator[Problem]:
    if "{problem}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}: expected a template with {{problem}} in it")
    for where, row in rows:
        missing = [column for column in spec.columns if column not in row]
        if missing:
            raise ValueError(
                f"{where}: task {spec.name!r} needs the column {', '.join(missing)}, the row has {', '.join(row)}"
            )
        check_types(dict(row), where, {name: kind for name, kind in spec.columns.items() if kind is not ANY})
        try:
            problem = spec.to_problem(row, prompt)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        if problem is not None:
            yield problem


def _hub_rows(spec: TaskSpec, config: str | None, split: str, revision: str | None) -> Iterator[tuple[str, Row]]:
    if revision is None:
        raise ValueError(
            f"task {spec.name!r}: no commit of {spec.hub_id} is on record, give revision= (or data_dir= with local files)"
        )
    import datasets

    try:
        rows = datasets.load_dataset(spec.hub_id, config, data_files=spec.data_file, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{spec.hub_id} cannot be loaded from the hub ({reason}): give data_dir= with local files; {spec.terms}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{spec.hub_id}: row {number}", row


def _distinct(problems: list[Problem]) -> list[Problem]:
    """Number the ids of equal texts: ids are made from the text, and some data sets contain a text twice."""
    seen: Counter[str] = Counter()
    distinct = []
    for problem in problems:
        seen[problem.problem_id] += 1
        times = seen[problem.problem_id]
        again = times > 1
        distinct.append(dataclasses.replace(problem, problem_id=f"{problem.problem_id}-{times}") if again else problem)
    return distinct


def _corrected(name: str, problems: list[Problem], targets: Mapping[str, Any]) -> list[Problem]:
    strange = sorted(set(targets) - {problem.problem_id for problem in problems})
    if strange:
        raise ValueError(f"task {name!r}: overrides names {', '.join(strange[:5])}, which is not one of its problems")
    return [
        dataclasses.replace(problem, target=targets[problem.problem_id]) if problem.problem_id in targets else problem
        for problem in problems
    ]


def _checked(name: str, problems: list[Problem], num: int | None) -> list[Problem]:
    check_unique(problems, f"task {name!r}")
    if num is not None and len(problems) < num:
        raise ValueError(f"task {name!r} gave {len(problems)} problems, {num} were asked for")
    return asked_once(problems)


def _refuse_unknown(name: str, options: dict[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise ValueError(
            f"task {name!r} has no option {', '.join(unknown)}: it takes {', '.join(sorted({*allowed, 'overrides'}))}"
        )


def entry_point_tasks() -> dict[str, EntryPoint]:
    """Tasks of installed packages, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_entry_point(point: EntryPoint, options: Mapping[str, Any]) -> list[Problem]:
    """Call the generator with the given options; it returns one mapping of problem fields for each problem."""
    generate = point.load()
    known = inspect.signature(generate).parameters
    unknown = sorted(set(options) - set(known))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"task {point.name!r} has no option {', '.join(unknown)}: it takes {', '.join(known) or 'none'}"
        )
    return [row if isinstance(row, Problem) else Problem.from_dict(row) for row in generate(**options)]


def load_gym(dataset: str | None = None, num: int | None = None, seed: int = 0, **config: Any) -> list[Problem]:
    """``num`` problems (default 100) of one of reasoning-gym's generated sets; ``config`` goes to its generator."""
    if dataset not in GYM_TYPES:
        raise ValueError(f"reasoning_gym dataset is {dataset!r}: expected one of {', '.join(sorted(GYM_TYPES))}")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"task 'reasoning_gym' needs a package ({error}): pip install reasoning-gym") from error
    answer_type, tolerance = GYM_TYPES[dataset]
    rows = reasoning_gym.create_dataset(dataset, seed=seed, size=100 if num is None else num, **config)
    return [
        Problem(
            f"reasoning_gym-{dataset}-{seed}-{number}",
            ask(R1_PROMPT, row["question"]),
            str(row["answer"]).strip("$ "),
            answer_type,
            domain=f"maths/{dataset}",
            tolerance=tolerance,
        )
        for number, row in enumerate(rows)
    ]
