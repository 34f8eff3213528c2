"""Routers in the shapes of vLLM's, whose kernels are loops over single tokens in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import routing_rules
from moe_steer import SteeringPlan
from naive_choice import told
from routing_rules import best, sigmoid, softmax


@dataclass(eq=False)
class FakeRouter:
    """What vLLM's routers keep, and ``_compute_routing``."""

    top_k: int = 2
    global_num_experts: int = 8
    scoring_func: str = "softmax"
    renormalize: bool = True

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        rows = [self.one(row.double().numpy()) for row in router_logits]
        ids_TK = torch.tensor([ids for ids, _ in rows], dtype=torch.int32).reshape(-1, self.top_k)
        return torch.tensor([weights for _, weights in rows], dtype=torch.float32).reshape(-1, self.top_k), ids_TK

    def one(self, logits_E: Any) -> tuple[list[int], list[float]]:
        """Ids and weights of one token."""
        scores_E = softmax(logits_E) if self.scoring_func == "softmax" else sigmoid(logits_E)
        bias = getattr(self, "e_score_correction_bias", None)
        key_E = scores_E if bias is None else scores_E + bias.double().numpy()
        groups = getattr(self, "num_expert_group", None)
        if groups:
            outside = routing_rules.outside_best_groups(key_E, groups, self.topk_group, 1 if bias is None else 2)  # type: ignore[attr-defined]
            key_E = key_E.copy()
            key_E[outside] = -9e9
        # Both are looked up there, so that naive_choice.told can say what is best.
        ids = routing_rules.best(key_E, self.top_k)
        weights = scores_E[ids] / (scores_E[ids].sum() if self.renormalize else 1.0)
        return ids, list(weights * getattr(self, "routed_scaling_factor", 1.0))


class FusedTopKRouter(FakeRouter):
    """As Mixtral and Qwen have it."""


@dataclass(eq=False)
class FusedTopKBiasRouter(FakeRouter):
    """As MiniMax-M2 has it."""

    scoring_func: str = "sigmoid"
    routed_scaling_factor: float = 1.5
    e_score_correction_bias: Tensor | None = None


@dataclass(eq=False)
class GroupedTopKRouter(FakeRouter):
    """As DeepSeek-V2 and V3 have it."""

    routed_scaling_factor: float = 2.5
    e_score_correction_bias: Tensor | None = None
    num_expert_group: int = 4
    topk_group: int = 2
    num_fused_shared_experts: int = 0


@dataclass(eq=False)
class CPURouter(GroupedTopKRouter):
    """As on CPUs."""

    use_grouped_topk: bool = True
    custom_routing_function: Any = None
    _hash_indices_table: Any = None


class CustomRoutingRouter(FakeRouter):
    """A function of the model's own: its weights are reached, its choice is not."""

    custom_routing_function = staticmethod(best)


class LyingRouter(FakeRouter):
    """Of a known name, and of another rule than its fields say."""

    def one(self, logits_E: Any) -> tuple[list[int], list[float]]:
        return super().one(-logits_E)


LyingRouter.__name__ = "FusedTopKRouter"
BIAS_E = torch.linspace(-0.2, 0.25, 8)
ROUTERS = {
    "softmax": lambda: FusedTopKRouter(),
    "not normalised": lambda: FusedTopKRouter(renormalize=False, top_k=3),
    "sigmoid and bias": lambda: FusedTopKBiasRouter(e_score_correction_bias=BIAS_E),
    "groups": lambda: GroupedTopKRouter(renormalize=False),
    "groups and bias": lambda: GroupedTopKRouter(scoring_func="sigmoid", e_score_correction_bias=BIAS_E),
    "on a CPU": lambda: CPURouter(scoring_func="sigmoid", e_score_correction_bias=BIAS_E),
}


class FakeRunner(nn.Module):
    """What is read of vLLM's MoERunner."""

    is_monolithic = False
    do_naive_dispatch_combine = False
    _quant_method = object()

    def __init__(self, router: FakeRouter, replicas: int = 0) -> None:
        super().__init__()
        self.router = router
        self.moe_config = SimpleNamespace(num_logical_experts=router.global_num_experts)
        router.global_num_experts += replicas


def by_hand(router: FakeRouter, plan: SteeringPlan | None, layer: int, logits_E: Any) -> dict[int, float]:
    """Expert -> weight of one token in a layer under a plan, in float64. Changes ``logits_E``."""
    mine = [entry for entry in (plan.experts if plan else ()) if entry.layer == layer]
    for entry in mine:
        logits_E[entry.expert] += entry.logit_bias
    forces = {way: [entry.expert for entry in mine if entry.force == way] for way in ("in", "out")}
    with told(8, forced=forces["in"], forbidden=forces["out"]):
        found = dict(zip(*router.one(logits_E), strict=True))
    gains = {entry.expert: entry.gain for entry in mine}
    new = {expert: weight * gains.get(expert, 1.0) for expert, weight in found.items()}
    share = sum(found.values()) / sum(new.values()) if plan and plan.renormalize and sum(new.values()) else 1.0
    return {expert: weight * share for expert, weight in new.items()}
