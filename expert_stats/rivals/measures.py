"""``Measures``: what only a model tells of its experts, summed by problem. One safetensors file.

Dimension letters: P problems, L layers with experts, E experts. Tokens are those of the responses, as input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from moe_steer.files import HeadedKind, load_headed, write_whole
from moe_steer.json_files import check_types

Array = np.ndarray[Any, Any]

MEASURED = ("weights", "outputs", "divergence")
"""Gate weights; norms of what experts add; KL divergence of the next token's distribution without an expert."""
KIND = HeadedKind(
    key="expert_measures",
    version=1,
    noun="measures",
    content="measures of experts",
    command="moe-steer measure",
    again="measure again with 'moe-steer measure'",
)
_NAMES = {"tokens_P", "selected_PLE", *(f"{name}_PLE" for name in MEASURED)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """Sums over the tokens of each problem's responses."""

    model: Mapping[str, Any]
    problems: tuple[str, ...]
    families: tuple[str, ...]
    """Of every problem; "" where none is named."""
    tokens_P: Array
    selected_PLE: Array
    """Tokens that selected the expert."""
    sums: Mapping[str, Array]
    """Name of `MEASURED` -> [P, L, E]; those that were measured."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write float32 sums; the file appears complete or not at all."""
        nothing = np.zeros((0, 0, 0), np.float32)
        arrays = {"tokens_P": self.tokens_P.astype(np.int64), "selected_PLE": self.selected_PLE.astype(np.int64)}
        arrays |= {f"{name}_PLE": self.sums.get(name, nothing).astype(np.float32) for name in MEASURED}
        head = {
            "version": KIND.version,
            "model": dict(self.model),
            "problems": self.problems,
            "families": self.families,
        }
        metadata = {KIND.key: json.dumps(head, sort_keys=True)}
        write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measures:
        """Read what ``save`` wrote; ValueError in one line for anything else."""
        return load_headed(path, KIND, _NAMES, _measures, framework="np")


def _measures(header: dict[str, Any], arrays: dict[str, Any]) -> Measures:
    check_types(header, "", {"model": dict, "problems": list[str], "families": list[str]})
    check_types(header["model"], "model", {"num_experts": int, "moe_layers": list[int]})
    shape = (len(header["problems"]), len(header["model"]["moe_layers"]), header["model"]["num_experts"])
    sums = {name: arrays[f"{name}_PLE"].astype(np.float64) for name in MEASURED if arrays[f"{name}_PLE"].size}
    sizes = [arrays["selected_PLE"].shape, *(table.shape for table in sums.values())]
    if set(sizes) != {shape} or arrays["tokens_P"].shape != shape[:1] or len(header["families"]) != shape[0]:
        raise ValueError(f"its tables are {sizes}: expected {shape} for problems, layers and experts")
    if not all(np.isfinite(table).all() for table in sums.values()) or (arrays["tokens_P"] < 1).any():
        raise ValueError("its sums are not all finite, or a problem has no tokens")
    return Measures(
        model=header["model"],
        problems=tuple(header["problems"]),
        families=tuple(header["families"]),
        tokens_P=arrays["tokens_P"],
        selected_PLE=arrays["selected_PLE"],
        sums=sums,
    )
