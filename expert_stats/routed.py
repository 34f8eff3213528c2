"""Routing that an engine recorded while it sampled: checked, and given to the same sinks as the routing of a forward pass here.

Engines return the ids of the experts that were selected, [rows, layers, top-k], as ``routed_experts``. What they have in common
was read in vLLM 0.30-0.32 and SGLang, and is checked here: one row a token in order, none for the last one (it was sampled and
never read); every decoder layer, dense ones included as zeros, which look like expert 0; ids are global and in no fixed order.

Dimension letters: R rows (tokens that have routing), L layers with experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from expert_stats.counter import RoutingCounter
from expert_stats.counts import RoutingCounts
from expert_stats.trace_counts import reference_tokens
from moe_steer.layers import ModelShape
from moe_steer.observe import RoutingSink
from moe_steer.tokens import MarkerSet, Trace

Array = np.ndarray[Any, Any]


class RoutedTrace(NamedTuple):
    """A trace cut to the tokens whose routing is known, and that routing: row r belongs to ``trace.token_ids[r]``."""

    trace: Trace
    topk_ids_RLK: Array
    """int64, along ``ModelShape.moe_layers``."""
    topk_weights_RLK: Array | None
    """float32, final weights; None where the engine returned ids alone."""


def routed_trace(
    trace: Trace, topk_ids: Array, shape: ModelShape, *, first: int = 0, topk_weights: Array | None = None
) -> RoutedTrace:
    """Bring the recorded ids of one trace into order.

    ``topk_ids``: integers, [rows, layers, k] or flat in that order; layers are all decoder layers or those with experts, k is
    the router's top-k (ids of shared experts that an engine fused in as further columns, all >= the number of experts, are
    left out). Rows run from token ``first`` (later than 0 where the engine skipped the prompt) to the last token but one, or
    to the last; rows of -1 at the end are padding. ``topk_weights``: the same shape.

    ValueError in one line for another number of rows, layers or columns, and for ids that no router can have selected (out of
    range, or one expert twice at a token: what rows of zeros, never recorded, look like).
    """
    where = f"routed_experts of trace {trace.trace_id!r}"
    wanted = len(trace.token_ids) - first
    if not 0 <= first < len(trace.token_ids):
        raise ValueError(
            f"{where} begin at token {first} of {len(trace.token_ids)}: give the number of prompt tokens skipped"
        )
    ids_RLK = _in_three(np.asarray(topk_ids), shape, wanted, where)
    weights_RLK = None if topk_weights is None else _in_three(np.asarray(topk_weights), shape, wanted, where)
    if weights_RLK is not None and weights_RLK.shape != ids_RLK.shape:
        raise ValueError(f"{where}: ids are {ids_RLK.shape} and weights {weights_RLK.shape}: give one weight an id")
    known = len(ids_RLK) - _padding(ids_RLK)
    if known not in (wanted, wanted - 1) or not known:
        raise ValueError(
            f"{where} hold {known} rows for {wanted} tokens: one a token is expected, but for the last; "
            "if the engine skipped prompt tokens, say how many (routed_experts_prompt_start)"
        )
    ids_RLK, columns = _routed_columns(_expert_layers(ids_RLK[:known], shape, where), shape, where)
    _refuse_impossible(ids_RLK, shape, where)
    if weights_RLK is not None:
        weights_RLK = _expert_layers(weights_RLK[:known], shape, where)[..., columns].astype(np.float32)
        if not np.isfinite(weights_RLK).all():
            raise ValueError(f"{where} come with weights that are not finite: record them again")
    return RoutedTrace(_cut(trace, first, first + known), ids_RLK, weights_RLK)


def replay(routed: RoutedTrace, shape: ModelShape, sink: RoutingSink) -> None:
    """Call ``sink(layer, topk_ids_TK, topk_weights_TK)`` once a layer, as `moe_steer.observe_routing` does in a forward pass.

    Weights that are not known are NaN: a sink that reads them shows it.
    """
    ids_RLK = torch.from_numpy(np.ascontiguousarray(routed.topk_ids_RLK))
    if routed.topk_weights_RLK is None:
        weights_RLK = torch.full(ids_RLK.shape, float("nan"))
    else:
        weights_RLK = torch.from_numpy(np.ascontiguousarray(routed.topk_weights_RLK))
    for index, layer in enumerate(shape.moe_layers):
        sink(layer, ids_RLK[:, index], weights_RLK[:, index])


def count_routed(
    routed: Iterable[RoutedTrace],
    shape: ModelShape,
    markers: MarkerSet,
    *,
    base: str = "generated",
    prompt_tail: int = 4,
    references: Mapping[int, str] | None = None,
    engine: str = "recorded",
    add_to: Sequence[RoutingCounts] = (),
    coming: Sequence[Trace] | None = None,
) -> RoutingCounts:
    """The counts that `collect_counts` takes of the same tokens, from recorded routing: no model runs.

    ``references``: as of `collect_counts`; by default those of these traces where they come as a sequence, none where they come
    one by one. ``engine``: who recorded it, kept among the versions. ``add_to``: earlier counts that these must fit; ``coming``: the traces, where ``routed`` comes
    one by one. ValueError for no traces, a trace_id that occurs twice, or counts that could not be added: before any is read.
    """
    if references is None and isinstance(routed, Sequence):
        references = reference_tokens([item.trace for item in routed], markers)
    counter = RoutingCounter(
        shape,
        markers,
        base=base,
        prompt_tail=prompt_tail,
        references=references,
        versions={"routing": (engine,)},
    )
    if coming is None:
        coming = [item.trace for item in routed] if isinstance(routed, Sequence) else ()
    counter.refuse_addition(add_to, coming)
    seen: set[str] = set()
    for item in routed:
        if item.trace.trace_id in seen:
            raise ValueError(f"trace_id {item.trace.trace_id!r} occurs twice: its routing would be counted twice")
        seen.add(item.trace.trace_id)
        counter.expect([item.trace], len(item.trace.token_ids))
        replay(item, shape, counter)
    if not seen:
        raise ValueError("there is no recorded routing to count: give rollouts that hold routed_experts")
    return counter.finish()


def _in_three(array: Array, shape: ModelShape, wanted: int, where: str) -> Array:
    """[rows, layers, k]; a flat array has the one split into these that fits the model and the number of tokens."""
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{where} are {array.dtype} values: integers, [rows, layers, top-k], are expected")
    if array.ndim == 3:
        return array
    if array.ndim not in (1, 2):
        raise ValueError(f"{where} have the shape {array.shape}: [rows, layers, top-k] is expected")
    for num_layers in (shape.num_layers, len(shape.moe_layers)):
        for rows in (wanted - 1, wanted):
            columns, rest = divmod(array.size, max(rows * num_layers, 1))
            if not rest and columns >= shape.top_k and (array.ndim == 1 or len(array) == rows):
                return array.reshape(rows, num_layers, columns)
    raise ValueError(
        f"{where} hold {array.size} numbers, which is no number of rows for {wanted} tokens "
        f"({shape.num_layers} layers, {len(shape.moe_layers)} of them with experts, top-{shape.top_k}): "
        "they are of another model, or of other tokens"
    )


def _padding(ids_RLK: Array) -> int:
    """Rows at the end that are -1 throughout."""
    used = np.flatnonzero((ids_RLK != -1).any(axis=(1, 2)))
    return len(ids_RLK) - (int(used[-1]) + 1 if len(used) else 0)


def _expert_layers(values_RLK: Array, shape: ModelShape, where: str) -> Array:
    if values_RLK.shape[1] == len(shape.moe_layers):
        return values_RLK
    if values_RLK.shape[1] == shape.num_layers:
        return values_RLK[:, list(shape.moe_layers)]
    raise ValueError(
        f"{where} have {values_RLK.shape[1]} layers: this model has {shape.num_layers}, {len(shape.moe_layers)} of them with experts"
    )


def _routed_columns(ids_RLK: Array, shape: ModelShape, where: str) -> tuple[Array, slice]:
    """Without the columns of shared experts."""
    columns = slice(0, shape.top_k)
    spare = ids_RLK[..., shape.top_k :]
    if ids_RLK.shape[2] < shape.top_k or (spare < shape.num_experts).any():
        raise ValueError(f"{where} have {ids_RLK.shape[2]} ids a token: this model selects {shape.top_k}")
    return ids_RLK[..., columns].astype(np.int64), columns


def _refuse_impossible(ids_RLK: Array, shape: ModelShape, where: str) -> None:
    outside = (ids_RLK < 0) | (ids_RLK >= shape.num_experts)
    if outside.any():
        row, layer, column = np.argwhere(outside)[0].tolist()
        raise ValueError(
            f"{where} name expert {ids_RLK[row, layer, column]} at row {row}, layer {shape.moe_layers[layer]}: "
            f"this model has 0-{shape.num_experts - 1}"
        )
    ordered = np.sort(ids_RLK, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if twice.any():
        row, layer = np.argwhere(twice)[0].tolist()
        raise ValueError(
            f"{where} name one expert twice at row {row}, layer {shape.moe_layers[layer]} ({ids_RLK[row, layer].tolist()}): "
            "the engine did not record this row"
        )


def _cut(trace: Trace, start: int, stop: int) -> Trace:
    """The tokens from ``start`` to ``stop``, as a trace of its own."""
    if start > trace.prompt_length:
        raise ValueError(
            f"routed_experts of trace {trace.trace_id!r} begin at token {start}, inside the response (its prompt has "
            f"{trace.prompt_length}): record the whole response"
        )
    thought_start, thought_end = trace.thought_start, trace.thought_end
    if thought_start is not None:
        thought_start = max(thought_start - start, 0) if thought_start <= stop else None
    if thought_end is not None:
        thought_end = thought_end - start if thought_start is not None and thought_end < stop else None
    return dataclasses.replace(
        trace,
        token_ids=trace.token_ids[start:stop],
        prompt_length=min(trace.prompt_length, stop) - start,
        thought_start=thought_start,
        thought_end=thought_end,
    )
