"""Routing counts of traces: teacher-forced through a model, and summed over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from expert_stats.counter import RoutingCounter
from expert_stats.counts import RoutingCounts, sum_counts
from expert_stats.trace_counts import reference_tokens
from moe_steer.console import tracked
from moe_steer.layers import (
    decoder,
    evaluating,
    model_shape,
    moe_layers,
    refuse_loops,
    token_limits,
    unwrap,
    weights_in_memory,
)
from moe_steer.observe import observe_routing
from moe_steer.tokens import MarkerSet, Trace, check_traces, right_padded

_MOST_TRACES = 256
"""In one forward pass: each has a table of bins and markers on the device, whatever its length."""


def collect_counts(
    model: Any,
    traces: Sequence[Trace],
    markers: MarkerSet,
    *,
    base: str = "generated",
    prompt_tail: int = 4,
    tokens_per_batch: int = 8192,
    batch_size: int | None = None,
    references: Mapping[int, str] | None = None,
    progress: bool | None = False,
    allow_empty: bool = False,
    add_to: Sequence[RoutingCounts] = (),
) -> RoutingCounts:
    """Count the routing of traces, each run once through the model with its own tokens as input.

    ``base``, ``prompt_tail``: which tokens count (`expert_stats.counter.count_sites`). ``tokens_per_batch``: padded tokens
    of one forward pass; ``batch_size``: maximum traces in one. ``references``: token id -> text of the tokens that markers are
    compared with; default those of these traces (`reference_tokens`). Parts that will be added need the same ones: the sum
    keeps those that all have. ``allow_empty``: without traces return zero counts (for a process without a share) instead of an error.
    ``add_to``: counts to which the caller will add the result.
    ``progress``: a bar (True), none (False), or a bar on a terminal and a line now and then elsewhere (None).

    Only the decoder runs, not the language-model head; counting happens on the device. The result does not depend on the
    order of the traces. ValueError, before anything runs, for a dense model, no traces, a trace_id that occurs twice, a
    token id outside the vocabulary, a trace longer than the model's context, or ``add_to`` of another kind or with the same traces.
    """
    shape = model_shape(model)
    if not shape.moe_layers:
        raise ValueError(
            f"{shape.model_type} is a dense model: routing can be counted in mixture-of-experts models only"
        )
    if traces or not allow_empty:
        check_traces(traces)
    _check_fit(model, traces)
    counter = RoutingCounter(
        shape,
        markers,
        base=base,
        prompt_tail=prompt_tail,
        references=reference_tokens(traces, markers) if references is None else references,
        routers=router_digest(model),
        versions={"torch": (torch.__version__,), "transformers": (version("transformers"),)},
    )
    counter.refuse_addition(add_to, traces)
    run_traces(model, traces, counter, tokens_per_batch=tokens_per_batch, batch_size=batch_size, progress=progress)
    return counter.finish()


def run_traces(
    model: Any,
    traces: Sequence[Trace],
    sink: Any,
    *,
    tokens_per_batch: int = 8192,
    batch_size: int | None = None,
    progress: bool | None = False,
    observe: Callable[[Any, Any], AbstractContextManager[None]] = observe_routing,
) -> None:
    """Run traces through the decoder, each once with its own tokens as input. ``sink``: a `RoutingCounter`, or what has its
    ``expect`` and call. ``observe``: what calls it."""
    refuse_loops(model, [layer.index for layer in moe_layers(model)])
    body, device = decoder(model), unwrap(model).get_input_embeddings().weight.device
    with evaluating(model), torch.no_grad(), observe(model, sink):
        for batch in tracked(batches(traces, tokens_per_batch, batch_size), "counting", shown=progress):
            width = max(len(trace.token_ids) for trace in batch)
            sink.expect(batch, width)
            body(**right_padded([trace.token_ids for trace in batch], device, width), use_cache=False)


def batches(traces: Sequence[Trace], tokens_per_batch: int, batch_size: int | None = None) -> Iterator[list[Trace]]:
    """Traces of similar length together, longest first (so that memory runs out at once or never), at most
    ``tokens_per_batch`` padded tokens or one trace each."""
    if tokens_per_batch < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"tokens_per_batch is {tokens_per_batch} and batch_size {batch_size}: give at least 1")
    batch: list[Trace] = []
    for trace in sorted(traces, key=lambda item: (-len(item.token_ids), item.trace_id)):
        full = batch and len(batch[0].token_ids) * (len(batch) + 1) > tokens_per_batch
        if full or len(batch) == (batch_size or _MOST_TRACES):
            yield batch
            batch = []
        batch.append(trace)
    if batch:
        yield batch


def router_digest(model: Any) -> str:
    """Fingerprint of the routers' weights, the same in every precision that bfloat16 can hold; "" if this process does not
    have them (sharded or not yet loaded)."""
    digest = hashlib.sha256()
    for layer in moe_layers(model):
        if not isinstance(layer.router, nn.Module):
            return ""
        with weights_in_memory(layer.router):
            tensors = list(layer.router.state_dict().items())
        for name, tensor in tensors:
            if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
                return ""
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].to(torch.bfloat16)
            digest.update(
                f"{layer.index} {name.removeprefix('gate.')}".encode()
                + sample.cpu().view(torch.int16).numpy().tobytes()
            )
        if not tensors:
            return ""
    return digest.hexdigest()


def _check_fit(model: Any, traces: Sequence[Trace]) -> None:
    num_tokens, limit = token_limits(model)
    for trace in traces:
        if max(trace.token_ids) >= num_tokens:
            raise ValueError(
                f"trace {trace.trace_id!r} holds the token id {max(trace.token_ids)}, this model has ids 0-{num_tokens - 1}: "
                "the trace was made with another tokenizer"
            )
        if limit is not None and len(trace.token_ids) > limit:
            raise ValueError(
                f"trace {trace.trace_id!r} has {len(trace.token_ids)} tokens, this model's context {limit}: leave it out or cut it"
            )


def reduce_counts(counts: RoutingCounts) -> RoutingCounts:
    """The sum over all processes, each with its own share of the traces; every process gets the sum.

    Of one process the counts are returned unchanged. ValueError on every process if they cannot be added.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    if torch.distributed.get_world_size() == 1:
        return counts
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, counts)
    return sum_counts(shares).check()  # raises on every process if the counts cannot be added
