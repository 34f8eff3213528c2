"""Second opinion on steering: the experts one token and one expert at a time in float64, with a gain on the weight.

``naive_steering`` puts this arithmetic in the place of a model's own experts for a while; logits computed under it are the
reference for ``moe_steer.steer``. It also keeps its own audit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gains = Mapping[tuple[int, int], float]
ExpertFn = Callable[[Any, int, Tensor], Tensor]
"""(experts module, expert id, x_D float64) -> the expert's output before its weight."""


@dataclass
class NaiveAudit:
    """(layer, expert) -> tokens that selected it, and the sum of (gain - 1) * weight over them."""

    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    weight_added: dict[tuple[int, int], float] = field(default_factory=dict)

    def count(self, key: tuple[int, int], added: float) -> None:
        self.tokens[key] = self.tokens.get(key, 0) + 1
        self.weight_added[key] = self.weight_added.get(key, 0.0) + added


def _halves(experts: Any, expert: int, x_D: Tensor) -> tuple[Tensor, Tensor]:
    projected = experts.gate_up_proj[expert].double() @ x_D
    middle = len(projected) // 2
    return projected[:middle], projected[middle:]


def _down(experts: Any, expert: int, inner: Tensor) -> Tensor:
    return experts.down_proj[expert].double() @ inner


def swiglu(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    gate, up = _halves(experts, expert, x_D)
    return _down(experts, expert, gate * torch.sigmoid(gate) * up)


def geglu(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    gate, up = _halves(experts, expert, x_D)
    inner = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return _down(experts, expert, inner * up)


def clamped_swiglu(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    limit = experts.limit if hasattr(experts, "limit") else experts.swiglu_limit
    gate, up = _halves(experts, expert, x_D)
    gate, up = gate.minimum(torch.tensor(limit)), up.clamp(-limit, limit)
    return _down(experts, expert, gate * torch.sigmoid(gate) * up)


def swiglu_clamped_after(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """Step-3.7 clamps the activated gate; without a limit the bound is infinite."""
    gate, up = _halves(experts, expert, x_D)
    activated = (gate * torch.sigmoid(gate)).clamp(max=experts.limit)
    return _down(experts, expert, activated * up.clamp(-experts.limit, experts.limit))


def _alpha_glu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1.0) * gate * torch.sigmoid(alpha * gate)


def minimax_m3(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    gate, up = _halves(experts, expert, x_D)
    return _down(experts, expert, _alpha_glu(gate, up, experts.swiglu_alpha, experts.swiglu_limit))


def gpt_oss(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """Transposed weights, gate and up interleaved, a bias on both projections."""
    projected = x_D @ experts.gate_up_proj[expert].double() + experts.gate_up_proj_bias[expert].double()
    inner = _alpha_glu(projected[0::2], projected[1::2], experts.alpha, experts.limit)
    return inner @ experts.down_proj[expert].double() + experts.down_proj_bias[expert].double()


def transposed_swiglu(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    projected = x_D @ experts.gate_up_proj[expert].double()
    middle = len(projected) // 2
    gate, up = projected[:middle], projected[middle:]
    return (gate * torch.sigmoid(gate) * up) @ experts.down_proj[expert].double()


def squared_relu(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """Nemotron-H: no gate."""
    return _down(experts, expert, torch.relu(experts.up_proj[expert].double() @ x_D) ** 2)


def dbrx(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """All experts' rows lie under one another in w1, v1 and w2."""
    rows = slice(expert * experts.ffn_hidden_size, (expert + 1) * experts.ffn_hidden_size)
    w1, v1, w2 = (getattr(experts.mlp, key)[rows].double() for key in ("w1", "v1", "w2"))
    gate = w1 @ x_D
    return (gate * torch.sigmoid(gate) * (v1 @ x_D)) @ w2


def longcat(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """Ids beyond the real experts stand for the identity."""
    return x_D if expert >= experts.num_routed_experts else swiglu(experts, expert, x_D)


def muse_spark(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """A norm follows every expert, before the weight."""
    y_D = swiglu(experts, expert, x_D) * (1.0 + experts.post_expert_norm.weight.double())
    return y_D / torch.sqrt((y_D**2).mean() + experts.post_expert_norm.eps)


def inkling2(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """The linear factor of the gate and the other half are bounded softly; the sigmoid sees the gate as it is."""
    gate, up = _halves(experts, expert, x_D)
    caps = experts.act_fn.gate_softcap.softcap, experts.act_fn.up_softcap.softcap
    soft, bounded = (cap * torch.tanh(half / cap) for half, cap in zip((gate, up), caps, strict=True))
    return _down(experts, expert, soft * torch.sigmoid(gate) * bounded)


EXPERT_FUNCTIONS: dict[str, ExpertFn] = {
    "aria": transposed_swiglu,
    "dbrx": dbrx,
    "deepseek_v4": clamped_swiglu,
    "gemma4": geglu,
    "glm5_next": clamped_swiglu,
    "gpt_oss": gpt_oss,
    "hy_v4": clamped_swiglu,
    "hy_v4_vl": clamped_swiglu,
    "inkling2": inkling2,
    "longcat_flash": longcat,
    "minimax_m3_vl_text": minimax_m3,
    "muse_spark": muse_spark,
    "nemotron_h": squared_relu,
    "step3p7": swiglu_clamped_after,
}
"""Families whose experts are not plain SwiGLU."""


def steered_weights(
    layer: int, ids_K: list[int], weights_K: list[float], gains: Gains, renormalize: bool
) -> list[float]:
    """One token's weights after the gains; with ``renormalize`` brought back to their former sum."""
    new_K = [w * gains.get((layer, expert), 1.0) for expert, w in zip(ids_K, weights_K, strict=True)]
    if renormalize and sum(new_K) > 0:
        new_K = [w * sum(weights_K) / sum(new_K) for w in new_K]
    return new_K


@contextmanager
def naive_steering(
    model: nn.Module, family: str, blocks: Mapping[int, nn.Module], gains: Gains, renormalize: bool = False
) -> Iterator[NaiveAudit]:
    """Run the given blocks (by layer index) with naive experts; the router and all else stay the library's."""
    audit = NaiveAudit()
    replaced: list[nn.Module] = []
    try:
        for layer, block in blocks.items():
            if family == "llama4":
                block.forward = _llama4_block(layer, block, gains, renormalize, audit)  # type: ignore[method-assign]
                replaced.append(block)
            else:
                experts: Any = block.experts
                function = EXPERT_FUNCTIONS.get(family, swiglu)
                experts.forward = _experts(layer, experts, function, gains, renormalize, audit)
                replaced.append(experts)
        yield audit
    finally:
        for module in replaced:
            del module.forward


def _experts(
    layer: int, experts: Any, function: ExpertFn, gains: Gains, renormalize: bool, audit: NaiveAudit
) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        shape = hidden_states.shape
        hidden_TD = hidden_states.reshape(-1, shape[-1]).double()
        output_TD = torch.zeros_like(hidden_TD)
        for t, (ids_K, old_K) in enumerate(zip(ids.tolist(), weights.double().tolist(), strict=True)):
            new_K = steered_weights(layer, ids_K, old_K, gains, renormalize)
            for expert, old, new in zip(ids_K, old_K, new_K, strict=True):
                output_TD[t] += new * function(experts, expert, hidden_TD[t])
                audit.count((layer, expert), new - old)
        return output_TD.reshape(shape).to(hidden_states.dtype)

    return forward


def _llama4_block(
    layer: int, block: Any, gains: Gains, renormalize: bool, audit: NaiveAudit
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The score multiplies the expert's input, so a gain does too: out = shared(x) + sum_e f_e(gain_e * s_e * x)."""

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = F.linear(hidden_TD, block.router.weight)
        output_TD = block.shared_expert(hidden_TD).double()
        for t, logits_E in enumerate(logits_TE.double()):
            ids_K = logits_E.topk(block.top_k).indices.tolist()
            old_K = [float(torch.sigmoid(logits_E[expert])) for expert in ids_K]
            new_K = steered_weights(layer, ids_K, old_K, gains, renormalize)
            for expert, old, new in zip(ids_K, old_K, new_K, strict=True):
                output_TD[t] += transposed_swiglu(block.experts, expert, new * hidden_TD[t].double())
                audit.count((layer, expert), new - old)
        return output_TD.to(hidden_states.dtype), logits_TE

    return forward
