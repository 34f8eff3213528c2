"""Look at a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from moe_steer.hooks import RoutingFn, output_hooks, routing_hooks, stop_after
from moe_steer.layers import MoELayer, decoder_layers, moe_layers

RoutingSink = Callable[[int, Tensor, Tensor], None]
ResidualSink = Callable[[int, Tensor], None]


@contextmanager
def observe_routing(model: Any, sink: RoutingSink) -> Iterator[None]:
    """Call ``sink(layer, topk_ids_TK, topk_weights_TK)`` once per mixture-of-experts layer and forward pass.

    T runs over all positions of the batch, row by row, padding included; K is the router's top-k. Ids are int64 and global;
    weights are float32 and final (after top-k, normalisation and scaling). Tensors stay on the device, detached.
    Opened inside ``steer`` it sees the weights after the gain, opened around it the weights before.
    ValueError for a dense or unreachable model, before anything is hooked.
    """

    def watch(layer: MoELayer) -> RoutingFn:
        def function(ids_TK: Tensor, weights_TK: Tensor) -> None:
            sink(layer.index, ids_TK.detach(), weights_TK.detach().float())

        return function

    with routing_hooks({layer: watch(layer) for layer in moe_layers(model)}):
        yield


@contextmanager
def observe_residual(model: Any, layers: Sequence[int], sink: ResidualSink, *, stop: bool = False) -> Iterator[None]:
    """Call ``sink(layer, hidden_BSD)`` with the residual stream at the output of each named decoder layer, once per forward.

    ``stop``: run one forward per with-block and end it, and the block, at the highest of the layers: neither the layers
    above nor the head run. ValueError when a layer does not exist.
    """
    _, modules = decoder_layers(model)
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"layer {layer} does not exist: this model has layers 0-{len(modules) - 1}")

    def watch(layer: int) -> Callable[[Tensor], None]:
        def function(hidden_BSD: Tensor) -> None:
            sink(layer, hidden_BSD.detach())

        return function

    with output_hooks({modules[layer]: watch(layer) for layer in layers}):
        with stop_after(modules[max(layers)]) if stop else nullcontext():
            yield
