"""What the contexts of a run report (a steering audit's rows): stored chunk by chunk, so that it survives a killed run too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from reasoning_evals.completions import JsonLinesWriter, complete_lines, json_line
from reasoning_evals.run_folder import digest

SUMS = ("tokens", "weight_added", "samples", "retried_samples", "retokenized", "retries")
"""The fields of a row that add up; all others say what the row is about."""


class AuditWriter:
    """Appends the rows of one chunk of one arm; makes the file on the first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: JsonLinesWriter | None = None

    def append(self, arm: str, chunk: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line."""
        if self._writer is None:
            self._writer = JsonLinesWriter(self._path)
        self._writer.append(json_line({"arm": arm, "chunk": chunk, "rows": list(rows)}))

    def __enter__(self) -> AuditWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def read_audit(folder: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Arm -> rows added up over the chunks of a run; arms whose context reported nothing are absent.

    A chunk that ran twice, because the run was killed in it, counts once.
    """
    chunks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("audit*.jsonl")):
        for line in complete_lines(path):
            entry = json.loads(line)
            chunks[entry["arm"], entry["chunk"]] = entry["rows"]
    totals: dict[str, dict[str, dict[str, Any]]] = {}
    for (arm, _), rows in sorted(chunks.items(), key=lambda item: item[0]):
        for row in rows:
            about = {name: value for name, value in row.items() if name not in SUMS}
            total = totals.setdefault(arm, {}).setdefault(digest(about), {name: row[name] for name in about})
            for name in SUMS:
                if name in row:
                    total[name] = total.get(name, 0) + row[name]
    return {arm: list(rows.values()) for arm, rows in totals.items()}
