"""Entries of a plan file, read strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moe_steer.entries.expert_entry import ExpertGain
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.json_files import quoted


def refuse_unknown(where: str, data: Mapping[str, Any], allowed: set[str]) -> None:
    """ValueError for a key of ``data`` that is not allowed."""
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise ValueError(f"unknown key {quoted(unknown[0])} in {where}: it may hold {', '.join(sorted(allowed))}")


def listed(data: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key, empty where there is none."""
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is {type(value).__name__}: give a JSON list")
    return value


def read_entry(kind: Any, keys: Sequence[str], where: str, position: int, item: Any) -> Any:
    """An entry of a kind from its JSON object; ValueError for an unknown key, and for one that is missing."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}[{position}] is {quoted(item)}: give a JSON object")
    refuse_unknown(f"{where}[{position}]", item, set(keys))
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    needed += ["file"] if kind is ResidualVector else []
    needed += ["gain"] if kind is ExpertGain and not {"force", "logit_bias"} & set(item) else []
    if set(needed) - set(item):
        raise ValueError(f"{where}[{position}] is not complete: give {', '.join(needed)}")
    return kind(**item)
