"""Routing counts: integer arrays that can be added, checked and saved, together with a signature of their origin.

Dimension letters: G groups of traces, M markers, L layers with experts, E experts.

On disk: one safetensors file with the arrays; its metadata has the signature as one JSON text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from safetensors.numpy import save

from moe_steer.files import HeadedKind, load_headed, write_whole
from moe_steer.json_files import check_types

_KIND = HeadedKind(
    key="routing_counts",
    version=1,
    noun="counts",
    content="routing counts",
    command="moe-steer collect",
    again="collect the counts again",
)

_TYPES: dict[str, Any] = {
    **{"model": dict, "markers": dict, "prompt_tail": int, "base": str, "routers": str, "counted": str},
    **dict.fromkeys(("num_layers", "num_experts", "top_k", "hidden_size"), int),
    **dict.fromkeys(("model_type", "name", "position", "token", "repeats", "tokenizer"), str),
    **{"moe_layers": list[int], "names": list[str], "forms": list[list[list[int]]], "coefficients": list[float]},
}
"""Of a signature, its model and its markers."""
Array = np.ndarray[Any, Any]
ARRAYS = ("joint_GMLE", "expert_GLE", "marker_GM", "total_G", "num_traces_G")


def save_counts(counts: RoutingCounts, path: str | os.PathLike[str]) -> None:
    """Check the counts and write them; the file appears complete or not at all."""
    counts.check()
    head = {"version": _KIND.version, "signature": counts.signature.to_dict(), "versions": counts.versions}
    # One metadata key only: the library writes several in no fixed order, and equal counts should be equal files.
    content = save(
        {name: np.ascontiguousarray(array) for name, array in counts.arrays.items()},
        metadata={_KIND.key: json.dumps(head, sort_keys=True)},
    )
    write_whole(path, content)


def load_counts(path: str | os.PathLike[str]) -> RoutingCounts:
    """Read and check a counts file; ValueError in one line says what is wrong with it."""

    def build(header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> RoutingCounts:
        versions = {key: tuple(value) for key, value in header["versions"].items()}
        check_types(header, "", {"signature": dict, "versions": dict})
        check_types(header["versions"], "versions", dict.fromkeys(header["versions"], list[str]))
        check_types(header["signature"], "signature", _TYPES)
        for part in ("model", "markers"):
            check_types(header["signature"][part], part, _TYPES)
        signature = CountsSignature(**header["signature"])
        return RoutingCounts(signature=signature, versions=versions, **arrays).check()

    return load_headed(path, _KIND, set(ARRAYS), build, framework="np")


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingCounts:
    """How often experts were selected, int64, per group of traces (``group_of``).

    ``joint_GMLE``: times the expert was selected at the marker's token. ``expert_GLE``: times it was selected at any base
    token. ``marker_GM``: occurrences of the marker. ``total_G``: base tokens. ``num_traces_G``: traces. Layer axis:
    ``moe_layers`` in order. Counts of the same signature add up, in any order, to the counts of all their traces.
    """

    signature: CountsSignature
    joint_GMLE: Array
    expert_GLE: Array
    marker_GM: Array
    total_G: Array
    num_traces_G: Array
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Versions of the libraries that computed the routing: selection rules change between versions."""

    @classmethod
    def zeros(
        cls, signature: CountsSignature, num_groups: int = 16, versions: Mapping[str, tuple[str, ...]] | None = None
    ) -> RoutingCounts:
        """Counts of no traces: the neutral element of addition."""
        num_markers, num_layers = len(signature.markers["names"]), len(signature.model["moe_layers"])
        num_experts = signature.model["num_experts"]
        return cls(
            signature=signature,
            joint_GMLE=np.zeros((num_groups, num_markers, num_layers, num_experts), dtype=np.int64),
            expert_GLE=np.zeros((num_groups, num_layers, num_experts), dtype=np.int64),
            marker_GM=np.zeros((num_groups, num_markers), dtype=np.int64),
            total_G=np.zeros(num_groups, dtype=np.int64),
            num_traces_G=np.zeros(num_groups, dtype=np.int64),
            versions=versions or {},
        )

    @property
    def arrays(self) -> dict[str, Any]:
        """The five arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    @property
    def num_groups(self) -> int:
        """Length of the group axis."""
        return len(self.total_G)

    @property
    def num_traces(self) -> int:
        """Traces that were counted."""
        return int(self.num_traces_G.sum())

    @property
    def num_tokens(self) -> int:
        """Base tokens that were counted."""
        return int(self.total_G.sum())

    @property
    def marker_names(self) -> tuple[str, ...]:
        """Names along the marker axis."""
        return tuple(self.signature.markers["names"])

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the decoder layers along the layer axis."""
        return tuple(self.signature.model["moe_layers"])

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        difference = self.signature.difference(other.signature)
        if difference is None and self.num_groups != other.num_groups:
            difference = f"num_groups is {self.num_groups} here and {other.num_groups} there"
        if difference is not None:
            raise ValueError(f"these counts cannot be added: {difference}")
        keys = sorted({*self.versions, *other.versions})
        return RoutingCounts(
            signature=self.signature.merged(other.signature),
            versions={key: tuple(sorted({*self.versions.get(key, ()), *other.versions.get(key, ())})) for key in keys},
            **{name: array + other.arrays[name] for name, array in self.arrays.items()},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        same_kind = self.signature.to_dict() == other.signature.to_dict() and dict(self.versions) == dict(
            other.versions
        )
        return same_kind and all(np.array_equal(array, other.arrays[name]) for name, array in self.arrays.items())

    __hash__ = None  # type: ignore[assignment]

    def subset(self, groups: Iterable[int]) -> RoutingCounts:
        """Only the counts of some groups; the group axis keeps its length, so that subsets can be added again."""
        keep_G = np.zeros(self.num_groups, dtype=np.int64)
        keep_G[list(groups)] = 1
        kept: dict[str, Any] = {
            name: array * keep_G.reshape(-1, *[1] * (array.ndim - 1)) for name, array in self.arrays.items()
        }
        return dataclasses.replace(self, **kept)

    def check(self) -> RoutingCounts:
        """Verify every law of counting and return the counts; ValueError names the law, the layer and both numbers."""
        top_k, num_experts = self.signature.model["top_k"], self.signature.model["num_experts"]
        sizes = {"G": self.num_groups, "M": len(self.marker_names), "L": len(self.moe_layers), "E": num_experts}
        for name, array in self.arrays.items():
            expected = tuple(sizes[letter] for letter in name.rpartition("_")[2])  # not made: a file may say any number
            if array.dtype != np.int64 or array.shape != expected:
                raise ValueError(f"{name} is {array.dtype} {array.shape}: expected int64 {expected}")
            if (array < 0).any():
                raise ValueError(f"{name} holds the negative count {array.min()}")
        routed_G1, routed_GM1 = self.total_G[:, None] * top_k, self.marker_GM[:, :, None] * top_k
        layers = f"moe_layers {list(self.moe_layers)}, {num_experts} experts, top-{top_k}"
        _law(f"selections per layer == tokens x top-k ({layers})", self.expert_GLE.sum(-1), routed_G1, np.equal)
        _law(
            f"selections at a marker per layer == occurrences x top-k ({layers})",
            self.joint_GMLE.sum(-1),
            routed_GM1,
            np.equal,
        )
        _law("selections of an expert <= tokens", self.expert_GLE, self.total_G[:, None, None], np.less_equal)
        _law("joint <= occurrences of the marker", self.joint_GMLE, self.marker_GM[:, :, None, None], np.less_equal)
        _law("joint <= selections of the expert", self.joint_GMLE, self.expert_GLE[:, None], np.less_equal)
        _law("occurrences of a marker <= tokens", self.marker_GM, self.total_G[:, None], np.less_equal)
        _law("a group without traces has no tokens", np.minimum(self.total_G, 1), self.num_traces_G, np.less_equal)
        return self

    def digest(self) -> str:
        """sha256 over signature and numbers."""
        head = json.dumps({"signature": self.signature.to_dict(), "versions": self.versions}, sort_keys=True)
        parts = [
            head.encode(),
            *(np.ascontiguousarray(array).astype("<i8").tobytes() for array in self.arrays.values()),
        ]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the signature; it appears complete or not at all."""

        save_counts(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingCounts:
        """Read and check a counts file; ValueError in one line for a missing, foreign, corrupt or inconsistent one."""

        return load_counts(path)


def sum_counts(parts: Iterable[RoutingCounts]) -> RoutingCounts:
    """The sum of at least one count."""
    parts = list(parts)
    if not parts:
        raise ValueError("there are no counts to add: give at least one")
    return reduce(add, parts)


def group_of(trace_id: str, num_groups: int) -> int:
    """The group of a trace: a stable hash of the part before the last "#", so that samples of one problem share a group."""
    key = trace_id.rpartition("#")[0] or trace_id
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_groups


def _law(name: str, left: Array, right: Array, holds: np.ufunc) -> None:
    right = np.broadcast_to(right, left.shape)
    broken = np.argwhere(~holds(left, right))
    if len(broken):
        at = tuple(int(index) for index in broken[0])
        raise ValueError(f"the counts break the law '{name}': {left[at]} against {right[at]} at {at}")


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
