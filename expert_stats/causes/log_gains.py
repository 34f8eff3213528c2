"""The derivative of an outcome with respect to the log gain of every expert of every layer, in one backward pass a batch.

The final weight w of a selected expert becomes w * exp(theta), theta = 0: a gain at the very place where a plan's gains act. So the
derivative says what the first small turn of each gain does: d outcome / d log gain. The choice of the top k is constant around
theta = 0. The weights that later routers give follow ("free"), or are held to what they are ("frozen").

And what an outcome becomes when experts really get a gain (`outcomes_under`): one forward a plan, with the routers free or frozen. Free:
later routers see the changed residual stream and choose anew. Frozen: each token keeps the experts and the weights that it has without
steering (they are recorded and replayed), so that the effect is what the experts themselves write, and what attention makes of it, not
what others are called in for. The gain acts after the replay, through `moe_steer.steer`, as in a steered run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expert_stats.causes.forwards import reading_batches, values_of
from expert_stats.causes.readings import Reading
from moe_steer.hooks import RoutingFn, routing_hooks
from moe_steer.layers import MoELayer, moe_layers
from moe_steer.plan import SteeringPlan
from moe_steer.steering import steer

Array = np.ndarray[Any, Any]
ROUTERS = ("free", "frozen")


@dataclass(frozen=True, kw_only=True, eq=False)
class LogGains:
    """Sums over the readings of each problem P: derivative by layer with experts L and expert E, and the value itself."""

    problems: tuple[str, ...]
    value_P: Array
    gradient_PLE: Array
    selected_LE: Array
    """Tokens, up to the last place that is read, that selected the expert."""


def log_gain_gradients(
    model: Any,
    readings: Sequence[Reading],
    *,
    router: str = "free",
    tokens_per_batch: int = 4096,
    share: tuple[int, int] = (0, 1),
    progress: Any = iter,
) -> LogGains:
    """Values and derivatives, [P, L, E] float64, of the readings; problems in the order of their names.

    ``share``: (index, number) of the batches to run, for ranks that deal them out; the sums of all shares add up to the whole.
    ``progress`` wraps the list of batches. ValueError for a dense model and for one whose kernels keep no gradient.
    """
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r}: choose one of {', '.join(ROUTERS)}")
    layers = moe_layers(model)
    problems = tuple(sorted({item.problem for item in readings}))
    number = {problem: index for index, problem in enumerate(problems)}
    num_experts = layers[0].num_experts
    gradient_PLE = np.zeros((len(problems), len(layers), num_experts))
    value_P = np.zeros(len(problems))
    selected_LE = np.zeros((len(layers), num_experts), dtype=np.int64)
    todo = reading_batches(model, readings, tokens_per_batch)[share[0] :: share[1]]
    for batch in progress(todo):
        seam = _Thetas(batch, frozen=router == "frozen")
        with routing_hooks({layer: seam.function(layer) for layer in layers}):
            values_B = values_of(model, batch, backward=True)
        rows = [number[item.problem] for item in batch]
        np.add.at(value_P, rows, values_B.numpy())
        for index, layer in enumerate(layers):
            gradient_BE, selected_E = seam.result(layer)
            np.add.at(gradient_PLE[:, index], rows, gradient_BE)
            selected_LE[index] += selected_E
    return LogGains(problems=problems, value_P=value_P, gradient_PLE=gradient_PLE, selected_LE=selected_LE)


class _Thetas:
    """theta [B, E + 1] of every layer for one batch; the last column is for ids of experts on another rank."""

    def __init__(self, batch: Sequence[Reading], *, frozen: bool) -> None:
        self._lengths = [item.needed for item in batch]
        self._frozen = frozen
        self._theta: dict[int, Tensor] = {}
        self._ids: dict[int, Tensor] = {}

    def function(self, layer: MoELayer) -> RoutingFn:
        num_rows, width = len(self._lengths), max(self._lengths)

        def scaled(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            if len(ids_TK) != num_rows * width:
                raise RuntimeError(
                    f"layer {layer.index} routes {len(ids_TK)} tokens of {num_rows} x {width}: this build is unknown"
                )
            dtype = torch.promote_types(weights_TK.dtype, torch.float32)
            if layer.index not in self._theta:  # called again, with the same routing, when the layer is recomputed
                zeros = torch.zeros((num_rows, layer.num_experts + 1), dtype=dtype, device=ids_TK.device)
                self._theta[layer.index] = zeros.requires_grad_()
                self._ids[layer.index] = ids_TK
            rows_T1 = torch.arange(num_rows, device=ids_TK.device).repeat_interleave(width)[:, None]
            theta_TK = self._theta[layer.index][rows_T1, ids_TK.clamp(max=layer.num_experts)]
            weights_TK = weights_TK.detach() if self._frozen else weights_TK
            return weights_TK.to(dtype) * theta_TK.exp()

        return scaled

    def result(self, layer: MoELayer) -> tuple[Array, Array]:
        """(gradient [B, E], selections by real tokens [E])."""
        if layer.index not in self._theta:
            raise RuntimeError(f"layer {layer.index} was never called: this build is unknown")
        theta, width = self._theta[layer.index], max(self._lengths)
        gradient = theta.grad
        if gradient is None:
            raise ValueError(
                f"the experts of layer {layer.index} keep no gradient, so the model's other derivatives would be wrong too: load it "
                "in bfloat16 or float32, with --dtype, from an unquantised checkpoint"
            )
        real_BS = torch.arange(width)[None] < torch.tensor(self._lengths)[:, None]
        ids = self._ids[layer.index].cpu()[real_BS.reshape(-1)].reshape(-1)
        selected_E = torch.bincount(ids.clamp(max=layer.num_experts), minlength=layer.num_experts + 1)
        return gradient[:, :-1].double().cpu().numpy(), selected_E[:-1].numpy()


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
