"""An expert planted by hand, for controls: it is selected at tokens of one kind and there alone, and adds one vector, or nothing.

What finds experts by their causes must find the one that writes, and must call the one that only goes with its tokens inert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_steer.hooks import call_hooks
from moe_steer.layers import MoELayer, moe_layers
from moe_steer.tokens import Trace

LOGIT = 10.0
"""What the planted router row aims at where its expert should fire; elsewhere at minus that."""


@torch.no_grad()
def block_inputs(model: Any, layer: MoELayer, traces: Sequence[Trace]) -> torch.Tensor:
    """What the router and the experts of a layer read, [T, D], of all tokens of the traces in a row."""
    inputs: list[torch.Tensor] = []
    with call_hooks(layer.block, lambda call: inputs.append(next(iter(call.values()))[0]), lambda *_: None):
        for trace in traces:
            model(torch.tensor([trace.token_ids]))
    return torch.cat(inputs)


@torch.no_grad()
def plant_router(layer: MoELayer, expert: int, hidden_TD: torch.Tensor, fires_T: torch.Tensor) -> None:
    """Let a router select ``expert`` where ``fires_T``, and there alone: a ridge regression on what the router reads."""
    wanted_T = torch.where(fires_T, LOGIT, -LOGIT)
    weighted_TD = hidden_TD * torch.where(fires_T, (~fires_T).sum() / fires_T.sum(), 1.0)[:, None]
    gram = weighted_TD.T @ hidden_TD + 1e-3 * torch.eye(hidden_TD.shape[1])
    router: Any = layer.router
    router.weight.data[expert] = torch.linalg.solve(gram, weighted_TD.T @ wanted_T)
    router.e_score_correction_bias.data[expert] = router.e_score_correction_bias.data.mean()


@torch.no_grad()
def plant_output(layer: MoELayer, expert: int, input_D: torch.Tensor, added_D: torch.Tensor) -> None:
    """Let the expert write ``added_D`` when it reads ``input_D``, before its weight; zeros make it inert."""
    experts: Any = layer.experts
    gate, up = (experts.gate_up_proj[expert] @ input_D).chunk(2)
    inner_I = torch.nn.functional.silu(gate) * up
    experts.down_proj.data[expert] = torch.outer(added_D, inner_I / (inner_I @ inner_I))


def plant(
    model: Any,
    layer: MoELayer,
    expert: int,
    traces: Sequence[Trace],
    fires: Callable[[Trace, int], bool],
    added_D: torch.Tensor,
) -> torch.Tensor:
    """Plant an expert that is selected at the tokens (trace, place) where ``fires`` and adds ``added_D`` times its weight there;
    returns the mean of what the experts read at these tokens, [D]."""
    hidden_TD = block_inputs(model, layer, traces)
    fires_T = torch.tensor([fires(trace, place) for trace in traces for place in range(len(trace.token_ids))])
    plant_router(layer, expert, hidden_TD, fires_T)
    input_D = hidden_TD[fires_T].mean(0)
    plant_output(layer, expert, input_D, added_D)
    return input_D


def layer_of(model: Any, index: int) -> MoELayer:
    """The mixture-of-experts layer of this decoder layer."""
    return next(layer for layer in moe_layers(model) if layer.index == index)
