"""Local files: a user's own problems as a task, and rows of data files (JSON, JSON lines, CSV, parquet; plain or gzipped)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_steer.json_files import csv_rows, decode, parse_json, quoted, read_json_lines, read_plain_or_gzipped, short
from reasoning_evals.problems import Problem, read_problems
from reasoning_evals.tasks.spec import ask

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")

FIELDS = tuple(field.name for field in dataclasses.fields(Problem))
_OPTIONAL = ("answer_type", "unit", "cluster_id", "domain", "tolerance")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:row``, row) of each row of one file."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from read_json_lines(path)
    elif name.endswith(".json"):
        yield from _json_rows(path)
    elif name.endswith(".csv"):
        yield from csv_rows(decode(read_plain_or_gzipped(path), str(path)), str(path))
    elif name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is no parquet file ({short(error)}): make or download it again") from error
        for number, row in enumerate(rows):
            yield f"{path}: row {number}", row
    else:
        raise ValueError(f"{path} is not a data file: expected a name that ends in {', '.join(SUFFIXES)}")


def find_files(data_dir: Path, family: str, split: str, config: str | None, name: str | None = None) -> list[Path]:
    """The data files of a task under a file or folder that the user named.

    Inside a folder, a subfolder with the data set's name is used; files named after the split, then after the
    configuration, are preferred. ``name``: the published file name, for data sets with similar files. ValueError if no
    file, or no unique choice, is found.
    """
    if data_dir.is_file():
        return [data_dir]
    if not data_dir.is_dir():
        raise ValueError(f"data_dir {data_dir} does not exist: give the data file or its folder")
    folder = data_dir / family if (data_dir / family).is_dir() else data_dir
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not found:
        raise ValueError(f"{folder} holds no data file: expected names that end in {', '.join(SUFFIXES)}")
    found = [path for path in found if path.name == name] or found
    for word in (config, split):
        named = [path for path in found if word and word.lower() in str(path.relative_to(folder)).lower()]
        found = named or found
    shards = {path.name.split("-000")[0] for path in found if "-of-" in path.name}
    if len(found) > 1 and not (len(shards) == 1 and all("-of-" in path.name for path in found)):
        names = ", ".join(str(path.relative_to(folder)) for path in found[:6])
        raise ValueError(
            f"{folder} holds {len(found)} files that may be split {split!r} ({names}): give one of them as data_dir"
        )
    return found


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = parse_json(read_plain_or_gzipped(path), str(path), "give a JSON list of objects")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}: item {number}", row


def load_own_file(
    path: str,
    columns: Mapping[str, str] | None = None,
    answer_type: str | None = None,
    unit: str | None = None,
    tolerance: float | None = None,
    prompt: str = "{problem}",
) -> list[Problem]:
    """The problems of a file, in order.

    Without ``columns`` each row has the columns of ``Problem``. With it, ``columns`` maps fields of ``Problem`` to columns of
    the file; other columns are ignored, and a missing ``problem_id`` becomes the file's name with the row's number.
    ``answer_type``, ``unit`` and ``tolerance`` apply to rows without their own; ``prompt`` is a template.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"{path} does not exist: give a file of problems, or the name of a task")
    defaults = {"answer_type": answer_type, "unit": unit, "tolerance": tolerance}
    given = {name: value for name, value in defaults.items() if value is not None}
    if columns is None and not given and prompt == "{problem}" and source.name.endswith((".jsonl", ".jsonl.gz")):
        return _some(read_problems(source), path)
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise ValueError(f"columns names {', '.join(unknown)}: a problem has the fields {', '.join(FIELDS)}")
    problems = []
    for number, (where, row) in enumerate(read_rows(source)):
        fields = dict(row) if columns is None else _pick(row, columns, where)
        if source.name.endswith((".csv", ".csv.gz")):
            fields = _from_cells(fields)
        fields.setdefault("problem_id", f"{source.name.removesuffix('.gz').rpartition('.')[0]}-{number}")
        for name, value in given.items():
            if fields.get(name) is None:
                fields[name] = value
        if type(fields.get("problem_id")) is int:
            fields["problem_id"] = str(fields["problem_id"])
        try:
            if isinstance(fields.get("prompt"), str) and prompt != "{problem}":
                fields["prompt"] = ask(prompt, fields["prompt"])
            problems.append(Problem.from_dict(fields))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from error
    return _some(problems, path)


def _from_cells(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the cells of a CSV row say: all are texts, and an optional one that is empty says nothing."""
    found = {name: None if name in _OPTIONAL and not str(value).strip() else value for name, value in fields.items()}
    with suppress(ValueError):  # a text that is no number is refused as one
        if found.get("tolerance") is not None:
            found["tolerance"] = float(str(found["tolerance"]))
    return found


def _some(problems: list[Problem], path: str) -> list[Problem]:
    if not problems:
        raise ValueError(f"{path} holds no problems: give a file with at least one")
    for problem in problems:
        if problem.answer_type == "choice" and re.fullmatch(r"\W*[K-Zk-z]\W*", problem.target):
            raise ValueError(
                f"{path}: target of {quoted(problem.problem_id)} is {quoted(problem.target)}: options are graded from A to J, so give at most ten, or True or False in full"
            )
    return problems


def is_file_name(name: str) -> bool:
    """Whether a task name is a file name."""
    return name.endswith(SUFFIXES) or "/" in name or "\\" in name


def _pick(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    missing = sorted(column for column in columns.values() if column not in row)
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; the row has {short(', '.join(row))}")
    return {field: row[column] for field, column in columns.items()}
