"""What routing counts are of, and their files: one safetensors file of version 2, by trace; files of version 1, in groups of traces, are still read.

Version 2: ``packed`` is the traces' packed counts one after the other (`TraceCounts.packed`: zlib over byte planes), ``ends_N``
where each ends; ``total_NB``, ``marker_NMB``, ``num_traces_N`` and ``group_N`` are their small numbers, ``joint_RLE`` and
``seen_R`` those of the reference tokens. The header names the traces. Version 1: ``joint_GMLE``, ``expert_GLE``, ``marker_GM``,
``total_G``, ``num_traces_G``; each group becomes one record without positions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from safetensors.numpy import save

from expert_stats.trace_counts import NUM_BINS, References, TraceCounts
from moe_steer.files import HeadedKind, load_headed, read_headed, write_whole
from moe_steer.json_files import check_types

KIND = HeadedKind(
    key="routing_counts",
    version=2,
    noun="counts",
    content="routing counts",
    command="moe-steer collect",
    again="collect the counts again",
)
_SMALL = ("total_NB", "marker_NMB", "num_traces_N", "group_N")
_NAMES = {"packed", "ends_N", *_SMALL, "joint_RLE", "seen_R"}
_GROUPED = {"joint_GMLE", "expert_GLE", "marker_GM", "total_G", "num_traces_G"}
Built = TypeVar("Built")
_TYPES: dict[str, Any] = {
    **{"model": dict, "markers": dict, "prompt_tail": int, "base": str, "routers": str, "counted": str},
    **dict.fromkeys(("num_layers", "num_experts", "top_k", "hidden_size"), int),
    **dict.fromkeys(("model_type", "name", "position", "token", "repeats", "tokenizer"), str),
    **{"moe_layers": list[int], "names": list[str], "forms": list[list[list[int]]], "coefficients": list[float]},
}
"""Of a signature, its model and its markers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountsSignature:
    """Everything that must be equal for two counts to be added."""

    model: Mapping[str, Any]
    """The model's shape (``ModelShape.to_dict``): model_type, num_layers, num_experts, top_k, moe_layers, hidden_size, name."""
    markers: Mapping[str, Any]
    """The markers (``MarkerSet.to_dict``): names, forms, coefficients, where they are read, tokenizer."""
    base: str = "generated"
    """Which tokens are the base rate: "generated" or "all"."""
    prompt_tail: int = 4
    """Number of last prompt tokens in which a marker counts for the response."""
    routers: str = ""
    """Fingerprint of the router weights; distinguishes two checkpoints of the same shape."""
    counted: str = "selections"
    """An expert counts as active at a token when it is among the top-k, regardless of its weight (RICE)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def difference(self, other: CountsSignature) -> str | None:
        """The first field that differs, with both values; None when counts may be added.

        Model names (folders or hub ids) may differ if the fingerprints of the routers are equal. A missing fingerprint ("":
        the routers were sharded) matches every other.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        if not (self.routers and other.routers):
            mine["routers"] = theirs["routers"] = None
        if self.routers and self.routers == other.routers:
            mine["model.name"] = theirs["model.name"] = None
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"{key} is {_short(mine.get(key))} here and {_short(theirs.get(key))} there"
        return None

    def merged(self, other: CountsSignature) -> CountsSignature:
        """The signature of a sum; the name that sorts first, so that the order of addition does not matter."""
        name = min(str(self.model.get("name", "")), str(other.model.get("name", "")))
        routers = self.routers or other.routers
        return dataclasses.replace(self, model={**self.model, "name": name}, routers=routers)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; sequences as JSON text, so that tuples and lists compare as equal."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"


class CountsParts(TypedDict):
    """What a file holds: the fields of `RoutingCounts`."""

    signature: CountsSignature
    traces: tuple[TraceCounts, ...]
    references: References | None
    versions: Mapping[str, tuple[str, ...]]


def save_counts(parts: CountsParts, path: str | os.PathLike[str]) -> None:
    """Write counts that were checked; the file appears complete or not at all."""
    traces, signature = parts["traces"], parts["signature"]
    num_markers, model = len(signature.markers["names"]), signature.model
    references = parts["references"] or References.none(len(model["moe_layers"]), model["num_experts"])
    arrays = {
        "packed": np.frombuffer(b"".join(trace.packed for trace in traces), np.uint8),
        "ends_N": np.cumsum([len(trace.packed) for trace in traces], dtype=np.int64),
        "total_NB": np.array([trace.total_B for trace in traces], np.int64).reshape(-1, NUM_BINS),
        "marker_NMB": np.array([trace.marker_MB for trace in traces], np.int64).reshape(-1, num_markers, NUM_BINS),
        "num_traces_N": np.array([trace.num_traces for trace in traces], np.int64),
        "group_N": np.array([trace.group for trace in traces], np.int64),
        "joint_RLE": references.joint_RLE,
        "seen_R": references.seen_R,
    }
    head = {
        "version": KIND.version,
        "signature": signature.to_dict(),
        "versions": parts["versions"],
        "traces": [[trace.trace_id, trace.digest, trace.family, trace.content] for trace in traces],
        "references": [[token, text] for token, text in zip(references.tokens, references.texts, strict=True)],
    }
    # One metadata key only: the library writes several in no fixed order, and equal counts should be equal files.
    metadata = {KIND.key: json.dumps(head, sort_keys=True)}
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=metadata))


def load_counts(path: str | os.PathLike[str], build: Callable[[CountsParts], Built]) -> Built:
    """``build`` of what a file holds; ValueError in one line says what is wrong with it, inside ``build`` too."""
    if Path(path).is_file():
        header = read_headed(path, KIND.key, KIND.again, (), "np").header
        if header is not None and header.get("version") == 1:
            return load_headed(
                path, KIND._replace(version=1), _GROUPED, lambda *read: build(_of_groups(*read)), framework="np"
            )
    return load_headed(path, KIND, _NAMES, lambda *read: build(_of_traces(*read)), framework="np")


def _origin(header: dict[str, Any]) -> tuple[CountsSignature, dict[str, tuple[str, ...]]]:
    """The signature and the versions of libraries in a header."""
    check_types(header, "", {"signature": dict, "versions": dict})
    check_types(header["versions"], "versions", dict.fromkeys(header["versions"], list[str]))
    check_types(header["signature"], "signature", _TYPES)
    for part in ("model", "markers"):
        check_types(header["signature"][part], part, _TYPES)
    return CountsSignature(**header["signature"]), {key: tuple(value) for key, value in header["versions"].items()}


def _of_traces(header: dict[str, Any], arrays: dict[str, Any]) -> CountsParts:
    check_types(header, "", {"traces": list[list[str]]})
    signature, versions = _origin(header)
    packed, ends = arrays["packed"].tobytes(), arrays["ends_N"].tolist()
    _refuse_sizes(arrays, len(header["traces"]), len(packed))
    traces = []
    for number, (trace_id, digest, family, content) in enumerate(header["traces"]):
        start = ends[number - 1] if number else 0
        traces.append(
            TraceCounts(
                trace_id,
                digest,
                family,
                arrays["total_NB"][number],
                arrays["marker_NMB"][number],
                packed[start : ends[number]],
                content,
                int(arrays["num_traces_N"][number]),
                int(arrays["group_N"][number]),
            )
        )
    tokens, texts = ([pair[side] for pair in header["references"]] for side in (0, 1))
    references = References(tuple(tokens), tuple(texts), arrays["joint_RLE"], arrays["seen_R"])
    if len(references.tokens) != len(references.seen_R) or len(references.tokens) != len(references.joint_RLE):
        raise ValueError(f"it names {len(references.tokens)} reference tokens and counts {len(references.seen_R)}")
    return CountsParts(
        signature=signature, traces=tuple(traces), references=references if traces else None, versions=versions
    )


def _refuse_sizes(arrays: dict[str, Any], number: int, size: int) -> None:
    for name in ("ends_N", *_SMALL):
        if arrays[name].dtype != np.int64 or len(arrays[name]) != number:
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}: expected int64 for {number} traces")
    ends = arrays["ends_N"]
    if (np.diff(ends, prepend=0) < 0).any() or (int(ends[-1]) if number else 0) != size:
        raise ValueError("its packed counts do not end where the last trace does")


def _of_groups(header: dict[str, Any], arrays: dict[str, Any]) -> CountsParts:
    """Groups as records: all tokens in the first part of the response, as no position is known."""
    signature, versions = _origin(header)
    groups, traces = len(arrays["total_G"]), []
    for group in np.flatnonzero(arrays["num_traces_G"] | arrays["total_G"]).tolist():
        joint_MLE, expert_LE = arrays["joint_GMLE"][group], arrays["expert_GLE"][group]
        expert_BLE = np.zeros((NUM_BINS, *expert_LE.shape), np.int64)
        marker_MB, total_B = np.zeros((len(joint_MLE), NUM_BINS), np.int64), np.zeros(NUM_BINS, np.int64)
        expert_BLE[1], marker_MB[:, 1], total_B[1] = expert_LE, arrays["marker_GM"][group], arrays["total_G"][group]
        content = b"".join(np.ascontiguousarray(array).tobytes() for array in (joint_MLE, expert_LE, marker_MB))
        traces.append(
            TraceCounts.pack(
                f"version 1, group {group} of {groups}",
                expert_BLE,
                joint_MLE,
                marker_MB,
                total_B,
                digest=hashlib.sha256(content).hexdigest()[:32],
                num_traces=int(arrays["num_traces_G"][group]),
                group=group,
            )
        )
    return CountsParts(signature=signature, traces=tuple(traces), references=None, versions=versions)
