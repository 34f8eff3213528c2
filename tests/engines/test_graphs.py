"""What a CUDA graph needs of the forward, without a GPU: it captures kernels and addresses once, and replays them for every later batch.

On tensors without values nothing can be read back or decided by. The kernels of one forward, recorded, and run again without any Python
of this project, follow plans, doses, scopes and batches that came later: what a step writes lies where it lay when they were recorded.
Whether vLLM captures a whole model with them is for a GPU to show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import tiny
from fake_routers import BIAS_E, ROUTERS, FakeRouter, FakeRunner
from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.tokens import special_tokens
from moe_steer_vllm.choosing import choose, rule_of
from moe_steer_vllm.following import Following, Step
from moe_steer_vllm.served import Served
from moe_steer_vllm.tables import steer_layer, steer_router

EXPERTS, WIDTH, GRAPH = 8, 4, 16
"""GRAPH: tokens of the captured graph, to which smaller batches are filled up."""
V = torch.tensor([1.0, -2.0, 0.5, 3.0])
PLANS = {
    "gains": SteeringPlan(experts=[ExpertGain(0, 1, 4.0), ExpertGain(0, 6, 0.0)]),
    "choice": SteeringPlan(
        experts=[ExpertGain(0, 7, 5.0, force="in"), ExpertGain(0, 5, force="out"), ExpertGain(0, 3, logit_bias=1.5)],
        renormalize=True,
    ),
    "thought": SteeringPlan(
        experts=[ExpertGain(0, 2, 3.0)],
        scope="thought",
        residual=[ResidualVector(0, vector=V, scope="answer"), ResidualVector(0, vector=-2 * V)],
    ),
}
Batch = dict[str, tuple[str, int, int]]
"""Request -> what it asks for, tokens before this step, and tokens in it."""
BATCHES: list[Batch] = [
    {},
    {"a": ("gains", 0, 5), "b": ("off", 0, 3), "c": ("choice", 0, 4)},
    {"a": ("gains", 5, 1), "c": ("choice", 4, 1)},
    {"c": ("choice", 5, 1), "a": ("gains", 6, 1)},
    {"d": ("thought", 0, 8), "e": ("gains*0.25", 0, 8)},
    {"d": ("thought", 8, 1), "f": ("thought*2", 0, 3)},
]
IDS = [1, 10, tiny.THINK, 11, 12, tiny.END_THINK, 21, 22, 10, 11]


class Layer(nn.Module):
    """A decoder layer as vLLM's are: what it adds, and the stream before it."""

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * hidden_TD, hidden_TD


class Steered:
    """A router and a layer under the plans, and what follows the requests."""

    def __init__(self, kind: str, device: str = "cpu") -> None:
        self.device = device
        self.following = Following(Served(PLANS), special_tokens(tiny.TinyTokenizer()), 4 * GRAPH, 6, device)
        self.router: FakeRouter = ROUTERS[kind]()
        rule = rule_of(self.router, EXPERTS, WIDTH, "cpu")
        rule = rule._replace(bias_E=None if rule.bias_E is None else rule.bias_E.to(device))
        # A kernel in tensors: the fakes' own are loops over numbers.
        kernel = lambda hidden_TD, logits_TE, *_: choose(rule, logits_TE, torch.zeros_like(logits_TE))  # noqa: E731
        self.router._compute_routing = kernel  # type: ignore[method-assign]
        self.runner, self.layer = FakeRunner(self.router), Layer()
        plans = list(PLANS.values())
        steer_router(self.runner, self.router, 0, plans, self.following.tokens, lambda: rule)
        steer_layer(self.layer, 0, plans, self.following.tokens)

    def forward(self, hidden_TD: Tensor, logits_TE: Tensor) -> tuple[Tensor, ...]:
        return *self.router._compute_routing(hidden_TD, logits_TE, None), *self.layer(hidden_TD)

    def step(self, batch: Batch) -> None:
        """Write what the tokens of a batch run under. A request that begins anew is another one."""
        before = np.array([before for _, before, _ in batch.values()])
        counts = np.array([count for *_, count in batch.values()])
        for request, (plan, _, _) in batch.items():
            self.following.come(request, {"moe_steer": plan})
        ids = [IDS[k] for start, count in zip(before, counts, strict=True) for k in range(start, start + count)]
        on_device = functools.partial(torch.tensor, device=self.device)
        step = Step(list(batch), counts, before, before + counts, lambda r, n: on_device(IDS[:n]))
        self.following.step(step, lambda: on_device(ids))

    def buffers(self) -> dict[str, Tensor]:
        """All tensors that a forward reads, by name."""
        return {**dict(self.runner.named_buffers("router")), **dict(self.layer.named_buffers("layer"))}


def inputs(seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((GRAPH, WIDTH), (GRAPH, EXPERTS))
    hidden_TD, logits_TE = (torch.randn(size, generator=draw).to(device) for size in sizes)
    return hidden_TD, logits_TE


@pytest.mark.parametrize("kind", ROUTERS)
def test_neither_a_step_nor_a_forward_reads_a_value_from_the_device(kind: str) -> None:
    """Tensors of the meta device have none: whoever reads one, copies one to the host, or decides by one fails."""
    steered = Steered(kind, "meta")
    for batch in BATCHES:
        steered.step(batch)
        outputs = steered.forward(*inputs(device="meta"))
        assert [one.device.type for one in outputs] == ["meta"] * 4


READERS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda rows: rows.sum().item(),
    "a branch": lambda rows: 1 if rows.any() else 0,
    "a list of places": lambda rows: rows.nonzero(),
    "a choice of rows": lambda rows: rows[rows > 0],
    "a copy": lambda rows: rows.cpu(),
    "a tensor of the host": lambda rows: rows + torch.zeros(GRAPH, dtype=torch.long),
}


@pytest.mark.parametrize("reads", READERS)
def test_a_forward_that_reads_a_value_is_found(reads: str) -> None:
    steered = Steered("softmax", "meta")
    inner = steered.router._compute_routing

    def compute_routing(*given: Any) -> Any:
        READERS[reads](steered.runner.steer_rows_CN[0, :GRAPH])
        return inner(*given)

    steered.router._compute_routing = compute_routing  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, NotImplementedError)):
        steered.forward(*inputs(device="meta"))


def captured(steered: Steered) -> GraphModule:
    """The kernels of one forward, on the very tensors it used; run again, they read what these hold then."""
    return make_fx(lambda hidden_TD, logits_TE: steered.forward(hidden_TD, logits_TE))(*inputs(seed=9))


def replayed(steered: Steered, graph: GraphModule) -> list[bool]:
    """Of each batch: whether outputs and hits of the graph are those of a forward."""
    found = []
    for seed, batch in enumerate(BATCHES):
        steered.step(batch)
        hits = steered.following.tokens.hits
        before = hits.clone()
        expected = steered.forward(*inputs(seed))
        added = hits - before
        hits.copy_(before)
        outputs = graph(*inputs(seed))
        same = all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
        found.append(same and torch.equal(hits - before, added))
    return found


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_graph_follows_the_plans_of_batches_that_come_after_its_capture(kind: str) -> None:
    steered = Steered(kind)
    graph = captured(steered)
    addresses = {name: one.data_ptr() for name, one in steered.buffers().items()}
    read = {one.data_ptr() for one in graph.buffers() if one.ndim}
    bias = {BIAS_E.data_ptr()} if getattr(steered.router, "e_score_correction_bias", None) is not None else set()
    assert read - bias <= set(addresses.values()), "a graph reads the buffers, and nothing that a step makes"
    assert replayed(steered, graph) == [True] * len(BATCHES)
    assert {name: one.data_ptr() for name, one in steered.buffers().items()} == addresses
    outputs = []
    for batch in BATCHES:
        steered.step(batch)
        outputs.append([one.clone() for one in graph(*inputs())])
    different = {tuple(tuple(one.flatten().tolist()) for one in output) for output in outputs}
    assert len(different) == len(BATCHES), "each batch has outputs of its own on the same inputs"


def test_a_graph_is_left_behind_by_a_table_that_moves() -> None:
    """The proof above can fail: a step that puts a new tensor in a buffer's place, as ``=`` would."""
    steered = Steered("softmax")
    graph = captured(steered)
    tokens = steered.following.tokens
    tokens.rows_CN = steered.runner.steer_rows_CN = steered.layer.steer_rows_CN = tokens.rows_CN.clone()
    assert replayed(steered, graph) != [True] * len(BATCHES)
