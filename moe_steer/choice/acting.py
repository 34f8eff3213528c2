"""From a plan to the function that changes each named layer's choice, token by token in scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_steer.audit import Audit
from moe_steer.choice.rerouting import Choice, Routed, as_routed, merge, rerouted
from moe_steer.gates.conditions import Factors
from moe_steer.layers import MoELayer
from moe_steer.plan import SteeringPlan

ScopeMask = Callable[[str], Tensor | None]
"""scope -> mask_T of the forward that runs, None for every token."""


def choice_functions(
    layers: list[MoELayer], plan: SteeringPlan, scope_mask: ScopeMask, audit: Audit, gates: Factors | None = None
) -> dict[MoELayer, Callable[[tuple[Any, ...], dict[str, Any], Any], Routed]]:
    """(arguments, keyword arguments, output) of a layer's router -> what it is to return, for every layer whose choice the
    plan changes."""
    functions = {}
    for layer in layers:
        entries = [entry for entry in plan.experts if entry.layer == layer.index and entry.acts_on_choice]
        asked = [entry for entry in plan.top_k if entry.layer == layer.index and entry.k != layer.top_k]
        if not entries and not asked:
            continue
        choices: dict[tuple[bool, bool], Choice] = {}
        for acts in (False, True):
            for other_k in (False, True):
                choices[acts, other_k] = Choice(
                    k=asked[0].k if other_k and asked else layer.top_k,
                    forced=tuple(e.expert for e in entries if acts and e.force == "in"),
                    forbidden=tuple(e.expert for e in entries if acts and e.force == "out"),
                    logit_bias={e.expert: e.logit_bias for e in entries if acts and e.logit_bias},
                )
        gated = {e.expert: gates.number_of(e.when) for e in entries if gates is not None and e.when is not None}
        scopes = (plan.scope if entries else None, asked[0].scope if asked else None)
        functions[layer] = _function(layer, choices, scopes, scope_mask, audit, (gates, gated))
    return functions


def _function(
    layer: MoELayer,
    choices: dict[tuple[bool, bool], Choice],
    scopes: tuple[str | None, str | None],
    scope_mask: ScopeMask,
    audit: Audit,
    gates: tuple[Factors | None, dict[int, int]],
) -> Callable[[tuple[Any, ...], dict[str, Any], Any], Routed]:
    """``scopes``: where experts are forced or biased, and where k is another; None: nowhere. ``gates``: the numbers of the gates of
    the experts that have one."""
    scope, k_scope = scopes
    following, gated = gates
    experts = sorted({*choices[True, False].forced, *choices[True, False].forbidden, *choices[True, False].logit_bias})

    def parts(num_tokens: int, device: torch.device) -> list[tuple[Tensor | None, Choice]]:
        """The tokens that are routed again, and how: none is in two parts. Every part runs in every forward, with tokens or
        without, so that ranks that hold pieces of one router stay together."""
        if k_scope is None or scope is None or scope == k_scope:
            where = scope_mask(scope if scope is not None else str(k_scope))
            return [(where, choices[scope is not None, k_scope is not None])]
        everything_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
        found = (scope_mask(name) for name in (scope, k_scope))
        acts_T, other_T = (everything_T if mask_T is None else mask_T.to(device) for mask_T in found)
        return [
            (acts_T & ~other_T, choices[True, False]),
            (~acts_T & other_T, choices[False, True]),
            (acts_T & other_T, choices[True, True]),
        ]

    def function(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Routed:
        before = as_routed(layer, output)
        after, open_TN = before, None
        factors: dict[int, Tensor] = {}
        if following is not None and gated:
            factors = {expert: following.part(n).reshape(-1).to(before.ids_TK.device) for expert, n in gated.items()}
            open_TN = torch.stack([_open(factors.get(e), before.ids_TK) for e in audit.choosing(layer.index)], 1)
        for mask_T, choice in parts(len(before.ids_TK), before.ids_TK.device):
            if factors and all(expert in factors for expert in experts) and choice.k == layer.top_k:
                # Where every gate is closed the router's own output stays, to the bit.
                anywhere_T = torch.stack([_open(factors[expert], before.ids_TK) for expert in experts]).any(0)
                mask_T = anywhere_T if mask_T is None else anywhere_T & mask_T.to(anywhere_T.device)
            after = merge(layer, after, rerouted(layer, choice.gated(factors), args, kwargs), mask_T)
        audit.count_choice(
            layer.index,
            layer.num_experts,
            before.ids_TK.long(),
            after.selected_TK(layer.num_experts).long(),
            (scope_mask(scope) if scope else None, scope_mask(k_scope) if k_scope else None),
            open_TN,
        )
        return after

    return function


def _open(factor_T: Tensor | None, ids_TK: Tensor) -> Tensor:
    """bool [T]: where an expert's gate is open; everywhere without one."""
    return torch.ones_like(ids_TK[:, 0], dtype=torch.bool) if factor_T is None else factor_T > 0
