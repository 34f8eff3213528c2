"""Routing counts on disk: one safetensors file with the arrays and, in its metadata, one JSON text with the signature."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from safetensors.numpy import save

from expert_stats.counts import ARRAYS, CountsSignature, RoutingCounts
from moe_steer.headed_file import HeadedKind, read_headed
from moe_steer.write_aside import write_bytes

_KIND = HeadedKind(
    key="routing_counts",
    version=1,
    noun="counts",
    content="routing counts",
    command="moe-steer collect",
    again="collect the counts again",
)


def save_counts(counts: RoutingCounts, path: str | os.PathLike[str]) -> None:
    """Write counts that pass their check; aside first, then renamed, so that no reader sees half a file."""
    counts.check()
    head = {"version": _KIND.version, "signature": counts.signature.to_dict(), "versions": counts.versions}
    # One metadata key only: the library writes several in no fixed order, and equal counts should be equal files.
    content = save(
        {name: np.ascontiguousarray(array) for name, array in counts.arrays.items()},
        metadata={_KIND.key: json.dumps(head, sort_keys=True)},
    )
    write_bytes(path, content)


def load_counts(path: str | os.PathLike[str]) -> RoutingCounts:
    """Read and check a counts file; ValueError in one line says what is wrong with it."""

    def build(header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> RoutingCounts:
        versions = {key: tuple(value) for key, value in header["versions"].items()}
        signature = CountsSignature(**header["signature"])
        return RoutingCounts(signature=signature, versions=versions, **arrays).check()

    return read_headed(path, _KIND, set(ARRAYS), build, framework="np")
