"""`Measures`: what only a model tells of its experts, summed by problem, as one safetensors file; and how traces through a model make it: gate weights, norms of what experts add, and what leaving each expert out does.

Weights and norms take one forward pass a batch. The divergence is exact: one more pass for every expert that a batch selects, with
a gain of 0, routers choosing anew (Ban&Pick, arXiv 2509.06346, ranks by it). On a large model that is hours: give few traces.

Dimension letters: P problems, L layers with experts, E experts. Tokens are those of the responses, as input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from expert_stats.causes.forwards import decoded, divergences, reading_batches
from expert_stats.causes.readings import Reading
from expert_stats.collect import run_traces
from expert_stats.trace_counts import problem_of
from moe_steer.backends import layout_of
from moe_steer.files import HeadedKind, load_headed, write_whole
from moe_steer.json_files import check_types
from moe_steer.layers import ModelShape, model_shape
from moe_steer.observe import RoutingSink, observe_expert_norms, observe_routing
from moe_steer.plan import ExpertGain, SteeringPlan
from moe_steer.steering import steer
from moe_steer.tokens import Trace, check_traces

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


Array = np.ndarray[Any, Any]
Watch = Callable[[str, Iterable[Any]], Iterable[Any]]


def measure_experts(
    model: Any,
    traces: Sequence[Trace],
    what: Sequence[str] = MEASURED,
    *,
    tokens_per_batch: int = 4096,
    share: tuple[int, int] = (0, 1),
    add: Callable[[Array], Array] = lambda part: part,
    watch: Watch = lambda label, items: items,
) -> Measures:
    """The sums of `MEASURED` named in ``what`` over the response tokens of traces; selections always.

    ``share``, ``add``: for ranks that deal the traces out, their share and the sum over ranks. ``watch(label, items)`` shows
    progress. ValueError for a dense model, traces that do not fit it, one without a response, and
    for outputs of a model that is spread over ranks.
    """
    shape = model_shape(model)
    if not shape.moe_layers:
        raise ValueError(f"{shape.model_type} is a dense model: it has no experts to measure")
    check_traces(traces)
    layout = layout_of(model)
    if "outputs" in what and (layout.same_tokens or layout.lockstep):
        raise ValueError(
            f"outputs of experts are measured where a rank holds whole experts, not under {layout.backend}"
        )
    readings = [_reading(trace) for trace in traces]
    names = tuple(sorted({item.problem for item in readings}))
    numbers = {name: number for number, name in enumerate(names)}
    own = slice(share[0], None, share[1])
    sums = _Sums(shape, numbers)
    run_traces(model, traces[own], sums, tokens_per_batch=tokens_per_batch)
    found = {"weights": add(sums.value_PLE)} if "weights" in what else {}
    if "outputs" in what:
        norms = _Sums(shape, numbers)
        run_traces(model, traces[own], norms, tokens_per_batch=tokens_per_batch, observe=observe_expert_norms)
        found["outputs"] = add(norms.value_PLE)
    if "divergence" in what:
        found["divergence"] = add(_left_out(model, shape, readings[own], numbers, tokens_per_batch, watch))
    family = {item.problem: trace.family or "" for item, trace in zip(readings, traces, strict=True)}
    tokens_P = np.zeros(len(names), np.int64)
    for item in readings:
        tokens_P[numbers[item.problem]] += len(item.at)
    return Measures(
        model=shape.to_dict(),
        problems=names,
        families=tuple(family[name] for name in names),
        tokens_P=tokens_P,
        selected_PLE=add(sums.selected_PLE),
        sums=found,
    )


def _reading(trace: Trace) -> Reading:
    at = tuple(range(trace.prompt_length, len(trace.token_ids)))
    if not at:
        raise ValueError(f"trace {trace.trace_id!r} has no response: there is nothing to measure, leave it out")
    tokens = tuple((token,) for token in trace.token_ids[trace.prompt_length :])
    return Reading(
        name=trace.trace_id,
        problem=problem_of(trace.trace_id),
        token_ids=trace.token_ids,
        at=at,
        tokens=tokens,
        odds=False,
        weight=1.0,
    )


class _Sums:
    """A sink of `run_traces`: sums of the values at response tokens, and selections, by problem."""

    def __init__(self, shape: ModelShape, numbers: dict[str, int]) -> None:
        size = (len(numbers), len(shape.moe_layers), shape.num_experts)
        self._shape, self._numbers = shape, numbers
        self.value_PLE, self.selected_PLE = np.zeros(size), np.zeros(size, np.int64)
        self._rows: list[int] = []
        self._response_T = torch.zeros(0, dtype=torch.bool)

    def expect(self, batch: Sequence[Trace], width: int) -> None:
        """One row a trace, padded to ``width``."""
        places = torch.arange(width)
        self._rows = [self._numbers[problem_of(trace.trace_id)] for trace in batch]
        inside = [(places >= trace.prompt_length) & (places < len(trace.token_ids)) for trace in batch]
        self._response_T = torch.stack(inside).reshape(-1)

    def __call__(self, layer: int, topk_ids_TK: Tensor, value_TK: Tensor) -> None:
        num, experts, device = len(self._rows), self._shape.num_experts, topk_ids_TK.device
        inside_T = self._response_T.to(device)
        row_T = torch.arange(num, device=device).repeat_interleave(len(inside_T) // num)[inside_T]
        ids_NK = topk_ids_TK[inside_T]
        if (ids_NK >= experts).any():
            raise ValueError(f"layer {layer} routed tokens to experts of other processes: measure with --backend plain")
        flat_N = (row_T[:, None] * experts + ids_NK).reshape(-1)
        table = torch.zeros(num * experts, dtype=torch.float64, device=device)
        table.index_add_(0, flat_N, value_TK[inside_T].double().reshape(-1))
        counted = torch.bincount(flat_N, minlength=num * experts)
        at = self._shape.moe_layers.index(layer)
        np.add.at(self.value_PLE[:, at], self._rows, table.view(num, experts).cpu().numpy())
        np.add.at(self.selected_PLE[:, at], self._rows, counted.view(num, experts).cpu().numpy())


def _left_out(
    model: Any,
    shape: ModelShape,
    readings: Sequence[Reading],
    numbers: dict[str, int],
    tokens_per_batch: int,
    watch: Watch,
) -> Array:
    """Sums of the divergence, [P, L, E]; 0 of an expert that no token of a batch selects, which leaving it out cannot change."""
    found = np.zeros((len(numbers), len(shape.moe_layers), shape.num_experts))
    todo = reading_batches(model, readings, tokens_per_batch) if readings else []
    for number, batch in enumerate(todo, start=1):
        rows = [numbers[item.problem] for item in batch]
        seen: set[tuple[int, int]] = set()
        with observe_routing(model, _note(seen)):
            before = decoded(model, batch)
        experts = [one for one in sorted(seen) if one[1] < shape.num_experts]
        for layer, expert in watch(f"leaving experts out, batch {number} of {len(todo)}", experts):
            with steer(model, SteeringPlan(experts=[ExpertGain(layer, expert, 0.0)]), quiet=True):
                after = decoded(model, batch)
            value_B = divergences(model, batch, before, after).numpy()
            np.add.at(found[:, shape.moe_layers.index(layer), expert], rows, value_B)
    return found


def _note(seen: set[tuple[int, int]]) -> RoutingSink:
    return lambda layer, ids_TK, _: seen.update((layer, int(expert)) for expert in ids_TK.unique())
