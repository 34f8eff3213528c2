"""results.json: what a job found, as plain values, the same bytes for the same values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_steer.files import write_whole

RESULTS_FILE = "results.json"


def write_results(folder: Path, values: Mapping[str, Any]) -> None:
    """Into a run's folder."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / RESULTS_FILE, text)


def read_results(folder: Path, script: str) -> dict[str, Any]:
    """What ``write_results`` wrote; ValueError, with what to do, where ``script`` has not come to its end."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds an unfinished job: start launch/{script} again, it continues where it was")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
