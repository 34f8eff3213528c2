"""The options of a job, read back from the run.json of its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from reasoning_evals.runs import read_run

OptionsT = TypeVar("OptionsT")


def stored_config(folder: Path) -> dict[str, Any]:
    """What the job was asked for, with what it noted beside; ValueError for a folder that is no run's."""
    config: dict[str, Any] = read_run(folder)["config"]
    return config


def options_from(config: Mapping[str, Any], kind: type[OptionsT], noted: Collection[str]) -> OptionsT:
    """The options in a config. ``noted``: what stands there and is no option. ValueError for keys of another version."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(config) - known - set(noted))
    if unknown:
        raise ValueError(
            f"the run has the setting {unknown[0]!r}, which this version does not know: use the one it had"
        )
    values = {key: value for key, value in config.items() if key not in noted}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
