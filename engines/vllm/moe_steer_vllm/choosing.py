"""The choice of experts once more in plain tensors, with some forced in or out: a fused kernel cannot be told.

What forcing means: ``moe_steer.entries.expert_entry``. A router is repeated only where, on made-up logits, the repetition gives what the
router gives (``rule_of``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Routing = Callable[..., tuple[Tensor, Tensor]]
"""(hidden_states, router_logits, indices_type, ...) -> weights and ids [T, K]."""
_KNOWN = ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter")
_TRIES, _CLOSE = 64, 1e-4


class Rule(NamedTuple):
    """How a router chooses and weighs. ``groups``: 1 where every expert may be chosen."""

    scoring: str
    top_k: int
    renormalize: bool
    scaling: float = 1.0
    groups: int = 1
    kept: int = 1
    bias_E: Tensor | None = None


def rule_of(router: Any, num_experts: int, hidden_size: int, device: torch.device | str) -> Rule:
    """The rule of a vLLM router; ValueError, which names the router, where its choice is not made by a known one. ``num_experts``: of
    the model, without replicas."""
    name = type(router).__name__
    refusal = f"the choice of experts of {name} cannot be reached, so experts cannot be forced: use gains or logit_bias"
    odd = (
        "custom_routing_function",
        "_hash_indices_table",
        "hash_indices_table",
        "bias_vl",
        "num_fused_shared_experts",
    )
    if name not in _KNOWN or any(getattr(router, key, None) is not None and getattr(router, key) != 0 for key in odd):
        raise ValueError(refusal)
    grouped = name == "GroupedTopKRouter" or bool(getattr(router, "use_grouped_topk", False))
    rule = Rule(
        scoring=router.scoring_func,
        top_k=router.top_k,
        renormalize=bool(router.renormalize),
        scaling=float(getattr(router, "routed_scaling_factor", 1.0)),
        groups=(router.num_expert_group or 1) if grouped else 1,
        kept=(router.topk_group or 1) if grouped else 1,
        bias_E=getattr(router, "e_score_correction_bias", None),
    )
    if rule.scoring not in ("softmax", "sigmoid"):
        raise ValueError(refusal)
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(_TRIES, num_experts, generator=generator).to(device)
    theirs = router._compute_routing(torch.zeros(_TRIES, hidden_size, device=device), logits_TE, None)
    ours = choose(rule, logits_TE, torch.zeros_like(logits_TE))
    one, other = (torch.zeros_like(logits_TE).scatter_(1, i.long(), w.float()) for w, i in (theirs, ours))
    if not torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE):
        raise ValueError(refusal)
    return rule


def choose(rule: Rule, logits_TE: Tensor, force_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (float32) and ids [T, K]. ``force_TE``: 1 forces in, -1 out, 0 leaves the expert to its score."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if rule.scoring == "softmax" else logits_TE.sigmoid()
    key_TE = scores_TE if rule.bias_E is None else scores_TE + rule.bias_E.float()
    key_TE = key_TE.masked_fill(force_TE < 0, -torch.inf)
    if rule.groups > 1:
        grouped_TGM = key_TE.view(len(key_TE), rule.groups, -1)
        # A group is worth its best expert, or its best two where a bias corrects the scores, as DeepSeek-V2 and V3 have it.
        best = grouped_TGM.topk(1 if rule.bias_E is None else 2, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(rule.kept, dim=-1).indices, True)
        key_TE = grouped_TGM.masked_fill(~kept_TG[..., None], -torch.inf).view_as(key_TE)
    # Masked groups stay behind all that may be chosen, and experts that are out behind those.
    key_TE = key_TE.clamp(min=torch.finfo(torch.float32).min)
    key_TE = key_TE.masked_fill(force_TE > 0, torch.inf).masked_fill(force_TE < 0, -torch.inf)
    ids_TK = key_TE.topk(rule.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK * rule.scaling, ids_TK
