"""Look at a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_steer.hooks import RoutingFn, call_hooks, output_hooks, routing_hooks, stop_after
from moe_steer.inside import not_again
from moe_steer.layers import MoELayer, decoder_layers, moe_layers, refuse_loops

RoutingSink = Callable[[int, Tensor, Tensor], None]
ResidualSink = Callable[[int, Tensor], None]


@contextmanager
def observe_routing(model: Any, sink: RoutingSink) -> Iterator[None]:
    """Call ``sink(layer, topk_ids_TK, topk_weights_TK)`` once per mixture-of-experts layer and forward pass.

    T runs over all positions of the batch, row by row, padding included; K is the router's top-k. Ids are int64 and global;
    weights are float32 and final (after top-k, normalisation and scaling). Tensors stay on the device, detached. A layer that a
    model runs several times in a forward (Inkling-2's loop) is handed over each time; what the backward pass runs again is not.
    Opened inside ``steer`` it sees the weights after the gain, opened around it the weights before.
    ValueError for a dense or unreachable model, before anything is hooked.
    """
    seen = not_again(sink)

    def watch(layer: MoELayer) -> RoutingFn:
        def function(ids_TK: Tensor, weights_TK: Tensor) -> None:
            seen(layer.index, ids_TK.detach(), weights_TK.detach().float())

        return function

    with routing_hooks({layer: watch(layer) for layer in moe_layers(model)}):
        yield


@contextmanager
def observe_expert_norms(model: Any, sink: RoutingSink) -> Iterator[None]:
    """Call ``sink(layer, topk_ids_TK, norms_TK)`` once per mixture-of-experts layer and forward pass: the L2 norm, float32, of what
    each selected expert adds to the layer's output (its final weight times its output).

    The experts are called K more times a forward, each time with the weights of all places but one at 0. ValueError for a model
    whose weights do not multiply the experts' outputs (Llama-4), before anything is hooked.
    """
    layers = moe_layers(model)
    if any(layer.input_scaled or layer.weights_first for layer in layers):
        raise ValueError(
            "the outputs of single experts are out of reach here (their weights act inside the layer): use another measure"
        )
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(call_hooks(layer.experts, lambda _: None, not_again(_norms(layer, sink))))
        yield


def _norms(layer: MoELayer, sink: RoutingSink) -> Callable[[dict[str, Any], Any], None]:
    own_calls: list[int] = []

    def after(arguments: dict[str, Any], _: Any) -> None:
        if own_calls:
            return  # a call of ours
        columns: list[Tensor] = []
        ids: list[Tensor] = []

        def only_one(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            ids[:] = [ids_TK.detach().clone()]
            alone_TK = torch.zeros_like(weights_TK)
            alone_TK[:, len(columns)] = weights_TK[:, len(columns)]
            return alone_TK

        own_calls.append(layer.index)
        try:
            with torch.no_grad(), routing_hooks({layer: only_one}):
                while not ids or len(columns) < ids[0].shape[1]:
                    output = layer.experts(*arguments.values())  # kernels name them otherwise than the class
                    columns.append(output.detach().float().reshape(len(ids[0]), -1).norm(dim=-1))
        finally:
            own_calls.clear()
        sink(layer.index, ids[0], torch.stack(columns, dim=-1))

    return after


@contextmanager
def observe_residual(model: Any, layers: Sequence[int], sink: ResidualSink, *, stop: bool = False) -> Iterator[None]:
    """Call ``sink(layer, hidden_BSD)`` with the residual stream at the output of each named decoder layer, once per forward.

    ``stop``: run one forward per with-block and end it, and the block, at the highest of the layers: neither the layers
    above nor the head run. ValueError when a layer does not exist, and for one that runs several times in a forward.
    """
    _, modules = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"layer {layer} does not exist: this model has layers 0-{len(modules) - 1}")
    refuse_loops(model, layers)
    seen = not_again(sink)

    def watch(layer: int) -> Callable[[Tensor], None]:
        def function(hidden_BSD: Tensor) -> None:
            seen(layer, hidden_BSD.detach())

        return function

    with output_hooks({modules[layer]: watch(layer) for layer in layers}):
        with stop_after(modules[max(layers)]) if stop else nullcontext():
            yield
