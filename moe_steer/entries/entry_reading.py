"""Entries of a plan file, read strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from moe_steer.entries.expert_entry import ExpertGain
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.gates.probe import Probe
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


def by_content(entry: Mapping[str, Any], probe: Callable[[str], Probe]) -> dict[str, Any]:
    """An entry's JSON values with what its gate's probes compute in place of where their files lie."""

    def one(condition: Mapping[str, Any]) -> dict[str, Any]:
        sha256 = {"sha256": probe(condition["file"]).digest()} if "file" in condition else {}
        return {key: value for key, value in condition.items() if key != "file"} | sha256

    when = entry.get("when")
    if when is None:
        return dict(entry)
    joined = next((key for key in ("all", "any") if key in when), None)
    said = one(when) if joined is None else {**when, joined: [one(condition) for condition in when[joined]]}
    return {**entry, "when": said}


def refuse_twice(experts: Sequence[ExpertGain], top_k: Sequence[Any]) -> None:
    """ValueError for an expert, or a layer of top_k, that is named twice."""
    seen: set[tuple[int, int]] = set()
    for entry in experts:
        key = (entry.layer, entry.expert)
        if key in seen:
            raise ValueError(f"layer {entry.layer} expert {entry.expert} occurs twice in the plan: keep one gain")
        seen.add(key)
    by_layer = [entry.layer for entry in top_k]
    if len(set(by_layer)) < len(by_layer):
        raise ValueError("top_k names a layer twice: keep one k for each layer")


def free_name(stem: str, taken: Collection[str]) -> str:
    """The name of a new file beside those that are taken."""
    endings = ("", *(f"-{number}" for number in range(2, len(taken) + 2)))
    return next(name for ending in endings if (name := f"{stem}{ending}.safetensors") not in taken)
