"""Rows of local data files: JSON, JSON lines, CSV and parquet, plain or gzipped, as the data sets are published."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reasoning_evals.problems import not_utf8, read_json_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:row``, row) of each row of one file."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from read_json_lines(path)
    elif name.endswith(".json"):
        yield from _json_rows(path)
    elif name.endswith(".csv"):
        for number, row in enumerate(csv.DictReader(io.StringIO(_text(path))), 2):
            yield f"{path}:{number}", row
    elif name.endswith(".parquet"):
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
            yield f"{path}: row {number}", row
    else:
        raise ValueError(f"{path} is not a data file: expected a name that ends in {', '.join(SUFFIXES)}")


def find_files(data_dir: Path, family: str, split: str, config: str | None, name: str | None = None) -> list[Path]:
    """The data files of a task under a file or folder that the user named.

    A folder called like the data set is looked into; files named after the split, and then after the configuration, are
    preferred to others. ``name`` is the file's name as published, where others could be taken for it. ValueError where nothing,
    or nothing certain, is found.
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
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}: item {number}", row


def _text(path: Path) -> str:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, error)) from error
