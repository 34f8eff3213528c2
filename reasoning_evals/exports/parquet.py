"""A run as one parquet file with one row per sample, for ``datasets`` and pandas."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from moe_steer.files import written_aside
from reasoning_evals.exports.graded_run import GradedRun, clean, open_graded_run

_COLUMNS = {
    "arm": "string",
    "model": "string",
    "task": "string",
    "problem_id": "string",
    "sample_idx": "int32",
    "question": "string",
    "target": "string",
    "answer_type": "string",
    "unit": "string",
    "domain": "string",
    "cluster_id": "string",
    "prompt": "string",
    "text": "string",
    "thought": "string",
    "answer": "string",
    "outcome": "string",
    "correct": "bool",
    "extracted": "string",
    "reason": "string",
    "method": "string",
    "state": "string",
    "finish_reason": "string",
    "thinking_tokens": "int32",
    "answer_tokens": "int32",
    "total_tokens": "int32",
    "seed": "int64",
    "config_hash": "string",
}


def export_parquet(run_folder: Path | str, path: Path | str, private: bool = False) -> Path:
    """Write all samples of a graded run, arms, problems and samples in the order of the run.

    ``datasets.load_dataset("parquet", data_files=path)`` gives every column its type even if all its values are missing.
    See ``open_graded_run`` for the errors.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Features, List, Value

    run = open_graded_run(run_folder, private)
    schema = Features({**{name: Value(kind) for name, kind in _COLUMNS.items()}, "token_ids": List(Value("int32"))})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = chain.from_iterable(_rows(run, arm) for arm in run.arms)
    with (
        written_aside(target) as aside,
        pyarrow.parquet.ParquetWriter(aside, schema.arrow_schema) as writer,
    ):
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == 1000:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema.arrow_schema))
                batch = []
        if batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema.arrow_schema))
    return target


def _rows(run: GradedRun, arm: str) -> Iterator[dict[str, Any]]:
    for _, problem, samples in run.samples(arm):
        for completion, grade in samples:
            thought = run.thought(completion)
            row: dict[str, Any] = {
                **grade.to_dict(),
                "model": run.model(arm),
                "question": problem.prompt,
                "target": problem.target,
                "answer_type": problem.answer_type,
                "unit": problem.unit,
                "prompt": completion.prompt,
                "text": completion.text,
                "thought": thought.thought,
                "answer": thought.answer,
                "correct": grade.correct,
                "seed": completion.seed,
                "config_hash": completion.config_hash,
                "token_ids": list(completion.token_ids),
            }
            yield {name: clean(value) if isinstance(value, str) else value for name, value in row.items()}
