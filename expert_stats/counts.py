"""Routing counts: one record a trace, whole numbers, that can be added, checked and saved, with a signature of their origin.

Dimension letters: N traces, G groups of traces, B bins of positions, M markers, R reference tokens, L layers with experts,
E experts. Files: `expert_stats.counts_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from expert_stats.counts_files import CountsParts, CountsSignature, load_counts, save_counts
from expert_stats.trace_counts import References, TraceCounts, problem_of

Array = np.ndarray[Any, Any]
NUM_GROUPS = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingCounts:
    """How often experts were selected, by trace and position (`TraceCounts`); traces sorted by id, then by their text.

    Layer axis: ``moe_layers`` in order. Counts of the same signature add up, in any order, to the counts of all their traces.
    ValueError for a trace that is there twice.
    """

    signature: CountsSignature
    traces: tuple[TraceCounts, ...] = ()
    references: References | None = None
    """Counts at reference tokens (`expert_stats.trace_counts`); None without traces."""
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Versions of the libraries that computed the routing: selection rules change between versions."""

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.traces, key=lambda trace: trace.key))
        for one, next_one in pairwise(ordered):
            if one.key == next_one.key:
                raise ValueError(
                    f"trace {one.trace_id!r} is there twice with the same text: add every trace once (the same counts named twice?)"
                )
        object.__setattr__(self, "traces", ordered)
        if self.references is None and ordered:
            object.__setattr__(self, "references", References.none(len(self.moe_layers), self.num_experts))

    @classmethod
    def zeros(cls, signature: CountsSignature, versions: Mapping[str, tuple[str, ...]] | None = None) -> RoutingCounts:
        """Counts of no traces: the neutral element of addition."""
        return cls(signature=signature, versions=versions or {})

    @property
    def num_traces(self) -> int:
        """Traces that were counted."""
        return sum(trace.num_traces for trace in self.traces)

    @property
    def num_tokens(self) -> int:
        """Base tokens that were counted."""
        return int(sum(int(trace.total_B.sum()) for trace in self.traces))

    @property
    def occurrences_M(self) -> Array:
        """Occurrences of every marker."""
        zero = np.zeros(len(self.marker_names), dtype=np.int64)
        return np.asarray(sum((trace.marker_MB.sum(-1) for trace in self.traces), zero))

    @property
    def marker_names(self) -> tuple[str, ...]:
        """Names along the marker axis."""
        return tuple(self.signature.markers["names"])

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the decoder layers along the layer axis."""
        return tuple(self.signature.model["moe_layers"])

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return int(self.signature.model["num_experts"])

    @property
    def families(self) -> tuple[str, ...]:
        """The domains that the traces name, sorted."""
        return tuple(sorted({trace.family for trace in self.traces if trace.family}))

    @property
    def cannot_answer(self) -> str:
        """In a line, what counts of groups (files of version 1) do not tell; "" for counts by trace."""
        if all(trace.group < 0 for trace in self.traces):
            return ""
        return (
            "counts of version 1 keep groups of traces: the robust test, intervals by problem, leaving a family out and the "
            "comparison with other tokens need counts by trace; collect them again"
        )

    def unpacked(self) -> Iterator[tuple[TraceCounts, Array, Array]]:
        """Every trace with its ``expert_BLE`` and ``joint_MLE``, one after the other."""
        for trace in self.traces:
            yield trace, *trace.expert_and_joint(len(self.moe_layers), self.num_experts)

    def grouped(self, num_groups: int = NUM_GROUPS) -> dict[str, Array]:
        """``joint_GMLE``, ``expert_GLE``, ``marker_GM``, ``total_G``, ``num_traces_G``, int64: sums over groups of problems."""
        sizes = (len(self.marker_names), len(self.moe_layers), self.num_experts)
        arrays = {
            "joint_GMLE": np.zeros((num_groups, *sizes), np.int64),
            "expert_GLE": np.zeros((num_groups, *sizes[1:]), np.int64),
            "marker_GM": np.zeros((num_groups, sizes[0]), np.int64),
            "total_G": np.zeros(num_groups, np.int64),
            "num_traces_G": np.zeros(num_groups, np.int64),
        }
        for trace, expert_BLE, joint_MLE in self.unpacked():
            group = trace.group % num_groups if trace.group >= 0 else group_of(trace.trace_id, num_groups)
            arrays["joint_GMLE"][group] += joint_MLE
            arrays["expert_GLE"][group] += expert_BLE.sum(0, dtype=np.int64)
            arrays["marker_GM"][group] += trace.marker_MB.sum(-1)
            arrays["total_G"][group] += int(trace.total_B.sum())
            arrays["num_traces_G"][group] += trace.num_traces
        return arrays

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        return sum_counts([self, other])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        return self._stamps() == other._stamps()

    __hash__ = None  # type: ignore[assignment]

    def _stamps(self) -> list[str]:
        head = json.dumps({"signature": self.signature.to_dict(), "versions": self.versions}, sort_keys=True)
        references = self.references.stamp if self.references is not None else ""
        return [head, *(trace.stamp for trace in self.traces), references]

    def check(self) -> RoutingCounts:
        """Verify every law of counting, of every trace, and return the counts; ValueError names the law and both numbers."""
        top_k, sizes = self.signature.model["top_k"], (len(self.moe_layers), self.num_experts)
        if sorted(set(self.moe_layers)) != list(self.moe_layers) or not set(self.moe_layers) <= set(
            range(self.signature.model["num_layers"])
        ):
            raise ValueError(
                f"moe_layers is {list(self.moe_layers)}: ascending layers of a model of {self.signature.model['num_layers']} are expected"
            )
        for trace in self.traces:
            if trace.total_B.ndim != 1 or trace.marker_MB.shape != (len(self.marker_names), len(trace.total_B)):
                raise ValueError(
                    f"trace {trace.trace_id!r} counts markers as {trace.marker_MB.shape}: expected "
                    f"{(len(self.marker_names), len(trace.total_B))}"
                )
            trace.check(*sizes, top_k)
        if self.references is not None:
            if self.references.joint_RLE.shape[1:] != sizes:
                raise ValueError(
                    f"references are {self.references.joint_RLE.shape}: expected {sizes} for layers and experts"
                )
            self.references.check(top_k)
        return self

    def digest(self) -> str:
        """sha256 over signature and numbers."""
        return hashlib.sha256("\0".join(self._stamps()).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the signature; it appears complete or not at all."""
        self.check()
        parts = CountsParts(
            signature=self.signature, traces=self.traces, references=self.references, versions=self.versions
        )
        save_counts(parts, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingCounts:
        """Read and check a counts file; ValueError in one line for a missing, foreign, corrupt or inconsistent one."""
        return load_counts(path, lambda parts: cls(**parts).check())


def sum_counts(parts: Iterable[RoutingCounts]) -> RoutingCounts:
    """The sum of at least one count: the traces of all of them. ValueError for counts of another kind, and for a trace that is
    in two of them. References stay where every part with traces counted them."""
    parts = list(parts)
    if not parts:
        raise ValueError("there are no counts to add: give at least one")
    signature, versions = parts[0].signature, {key: {*value} for key, value in parts[0].versions.items()}
    references = parts[0].references
    for part in parts[1:]:
        difference = signature.difference(part.signature)
        if difference is not None:
            raise ValueError(f"these counts cannot be added: {difference}")
        signature = signature.merged(part.signature)
        for key, value in part.versions.items():
            versions.setdefault(key, set()).update(value)
        if references is None or part.references is None:
            references = references or part.references
        else:
            references = references + part.references
    return RoutingCounts(
        signature=signature,
        traces=tuple(trace for part in parts for trace in part.traces),
        references=references,
        versions={key: tuple(sorted(value)) for key, value in sorted(versions.items())},
    )


def group_of(trace_id: str, num_groups: int) -> int:
    """The group of a trace: a stable hash of its problem, so that samples of one problem share a group."""
    return int.from_bytes(hashlib.sha256(problem_of(trace_id).encode()).digest()[:8], "big") % num_groups
