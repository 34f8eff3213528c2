"""What an outcome becomes when experts really get a gain: one forward a plan, with the routers of the model free or frozen.

Free: later routers see the changed residual stream and choose anew. Frozen: each token keeps the experts and the weights that it has
without steering (they are recorded and replayed), so that the effect is what the experts themselves write, and what attention makes
of it, not what others are called in for. The gain acts after the replay, through `moe_steer.steer`, as in a steered run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from expert_stats.causes.forwards import reading_batches, values_of
from expert_stats.causes.log_gains import ROUTERS
from expert_stats.causes.readings import Reading
from moe_steer.hooks import RoutingFn, routing_hooks
from moe_steer.layers import MoELayer, moe_layers
from moe_steer.plan import SteeringPlan
from moe_steer.steering import steer

Array = np.ndarray[Any, Any]
_Routing = dict[int, tuple[Tensor, Tensor]]
"""Layer -> (ids [T, K], weights [T, K]) of one batch."""


def outcomes_under(
    model: Any,
    readings: Sequence[Reading],
    plans: Sequence[SteeringPlan],
    *,
    router: str = "free",
    tokens_per_batch: int = 4096,
    share: tuple[int, int] = (0, 1),
    progress: Any = iter,
) -> Array:
    """The outcome of each problem under each plan, [N plans, P problems in the order of their names], float64.

    ``router``: free or frozen (see above). ``share``, ``progress``: see ``log_gain_gradients``.
    """
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r}: choose one of {', '.join(ROUTERS)}")
    number = {problem: index for index, problem in enumerate(sorted({item.problem for item in readings}))}
    value_NP = np.zeros((len(plans), len(number)))
    todo = reading_batches(model, readings, tokens_per_batch)[share[0] :: share[1]]
    for batch in progress(todo):
        rows = [number[item.problem] for item in batch]
        routing: _Routing = {}
        if router == "frozen":
            with _recorded(model, routing):
                values_of(model, batch)
        for index, plan in enumerate(plans):
            with _replayed(model, routing), steer(model, plan, quiet=True):
                np.add.at(value_NP[index], rows, values_of(model, batch).numpy())
    return value_NP


@contextmanager
def _recorded(model: Any, routing: _Routing) -> Iterator[None]:
    def note(layer: MoELayer) -> RoutingFn:
        def function(ids_TK: Tensor, weights_TK: Tensor) -> None:
            routing[layer.index] = ids_TK.clone(), weights_TK.clone()

        return function

    with routing_hooks({layer: note(layer) for layer in moe_layers(model)}):
        yield


@contextmanager
def _replayed(model: Any, routing: _Routing) -> Iterator[None]:
    """Give every token the recorded experts and weights; without a recording, nothing is hooked."""

    def give(layer: MoELayer) -> RoutingFn:
        return lambda ids_TK, weights_TK: routing[layer.index]

    with routing_hooks({layer: give(layer) for layer in moe_layers(model)} if routing else {}):
        yield
