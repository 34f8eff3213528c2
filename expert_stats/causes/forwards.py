"""Readings through a model: values by problem, with or without a gradient, in bounded memory.

The decoder runs once a batch; the head runs over a bounded number of places at a time, because the logits of a long trace would
outweigh all else. With a gradient, the head's gradient is gathered at the decoder's output first and then taken through the
decoder, whose layers are recomputed one by one (`moe_steer.inside.recomputed`). Weights are frozen: only activations carry a gradient.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expert_stats.causes.readings import Reading
from moe_steer.contrasts.sequences import batches, check_sequences, padded
from moe_steer.hooks import call_hooks
from moe_steer.inside import recomputed, replaced_output
from moe_steer.layers import decoder, decoder_layers, evaluating, unwrap

HEAD_TOKENS = 2048
"""Places whose logits are held at once."""


def reading_batches(model: Any, readings: Sequence[Reading], tokens_per_batch: int) -> list[list[Reading]]:
    """Readings of about one length together. ValueError for what does not fit the model."""
    if not readings:
        raise ValueError("there is nothing to read an outcome from: give traces or texts")
    check_sequences(model, readings)  # type: ignore[arg-type]
    return list(batches(readings, tokens_per_batch))


def values_of(model: Any, batch: Sequence[Reading], *, backward: bool = False) -> Tensor:
    """Value of each reading [B], float64 on the CPU. ``backward``: also send the gradient of their sum to whatever carries one."""
    inner, body = unwrap(model), decoder(model)
    call = _call(inner, batch)
    values_B = torch.zeros(len(batch), dtype=torch.float64)
    places = [(row, number) for row, item in enumerate(batch) for number in range(len(item.at))]
    _, layers = decoder_layers(model)
    with evaluating(model), torch.set_grad_enabled(backward), recomputed(layers if backward else []):
        output = _decoded(inner, body, call)
        hidden_BSD = output[0]
        if backward and not hidden_BSD.requires_grad:
            raise ValueError(
                "no gradient reaches the output of this model's decoder, its kernels keep none: load it in bfloat16 or float32, from an "
                "unquantised checkpoint"
            )
        leaf_BSD = hidden_BSD.detach().requires_grad_(backward)
        for start in range(0, len(places), HEAD_TOKENS):
            some = places[start : start + HEAD_TOKENS]
            value_N = _read(batch, some, lambda one: _logits(inner, body, call, output, one), leaf_BSD)
            values_B.index_add_(0, torch.tensor([row for row, _ in some]), value_N.detach().double().cpu())
            if backward:
                value_N.sum().backward()  # type: ignore[no-untyped-call]
        if backward:
            hidden_BSD.backward(leaf_BSD.grad)
    return values_B


def decoded(model: Any, batch: Sequence[Reading]) -> Any:
    """The decoder's output, which the head reads; no gradient."""
    inner, body = unwrap(model), decoder(model)
    with evaluating(model), torch.no_grad():
        return _decoded(inner, body, _call(inner, batch))


def divergences(model: Any, batch: Sequence[Reading], before: Any, after: Any) -> Tensor:
    """KL(before || after), of two outputs of ``decoded``, of the next token's distribution, in nats, summed over the places of each reading: [B], float64."""
    inner, body = unwrap(model), decoder(model)
    call, found_B = _call(inner, batch), torch.zeros(len(batch), dtype=torch.float64)
    places = [(row, at) for row, item in enumerate(batch) for at in item.at]
    with evaluating(model), torch.no_grad():
        for start in range(0, len(places), HEAD_TOKENS // 2):
            rows, at = (list(side) for side in zip(*places[start : start + HEAD_TOKENS // 2], strict=True))
            log_p, log_q = (
                _logits(inner, body, call, output, output[0][rows, at]).log_softmax(-1) for output in (before, after)
            )
            value_N = (log_p.exp() * (log_p - log_q)).sum(-1)
            found_B.index_add_(0, torch.tensor(rows), value_N.double().cpu())
    return found_B


def _call(inner: Any, batch: Sequence[Reading]) -> dict[str, Any]:
    return {**padded(batch, inner.get_input_embeddings().weight.device), "use_cache": False}  # type: ignore[arg-type]


def _decoded(inner: Any, body: Any, call: dict[str, Any]) -> Any:
    """The decoder's output. The whole model is called, so that a wrapper prepares the decoder's arguments, and its head sees one
    place only."""
    caught: list[Any] = []
    with call_hooks(body, lambda _: None, lambda _, output: caught.append(output)):
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        inner(**call, **keep)
    return caught[-1]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    shown = copy.copy(output)
    shown["last_hidden_state"] = hidden
    return shown


def _logits(inner: Any, body: Any, call: dict[str, Any], output: Any, hidden_ND: Tensor) -> Tensor:
    """Logits [N, V] of hidden states at places of any rows: the model's own head, with what it does to the logits, on one long row."""
    with replaced_output(body, _with_hidden(output, hidden_ND[None])):
        logits_NV: Tensor = inner(**call).logits[0]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _read(
    batch: Sequence[Reading],
    places: Sequence[tuple[int, int]],
    logits_of: Callable[[Tensor], Tensor],
    hidden_BSD: Tensor,
) -> Tensor:
    """The weighted value at each place (row, number among its places), [N]."""
    device = hidden_BSD.device
    rows_N = torch.tensor([row for row, _ in places], device=device)
    at_N = torch.tensor([batch[row].at[number] for row, number in places], device=device)
    logits_NV = logits_of(hidden_BSD[rows_N, at_N])
    device = logits_NV.device
    # Sets of one row are of one size; those of other rows are filled up with their own first token, which counts once.
    sets = [batch[row].tokens[number] for row, number in places]
    widest = max(map(len, sets))
    tokens_NK = torch.tensor([(*one, *one[:1] * (widest - len(one))) for one in sets], device=device)
    fill_NK = (
        torch.arange(widest, device=device)[None] >= torch.tensor([len(one) for one in sets], device=device)[:, None]
    )
    chosen_N = logits_NV.gather(-1, tokens_NK).masked_fill(fill_NK, -torch.inf).logsumexp(-1)
    odds_N = torch.tensor([batch[row].odds for row, _ in places], device=device)
    # Not from log p: where p is nearly 1, as in a loop, 1 - p would round to 0.
    without_NV = logits_NV.scatter(-1, tokens_NK, -torch.inf)
    rest_N = torch.where(odds_N[:, None], without_NV, logits_NV).logsumexp(-1)
    weights_N = torch.tensor([batch[row].weight for row, _ in places], dtype=logits_NV.dtype, device=device)
    return weights_N * (chosen_N - rest_N)
