"""From a plan to the function that changes each named layer's choice, token by token in scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_steer.audit import Audit
from moe_steer.choice.rerouting import Choice, Routed, as_routed, merge, rerouted
from moe_steer.layers import MoELayer
from moe_steer.plan import SteeringPlan

ScopeMask = Callable[[str], Tensor | None]
"""scope -> mask_T of the forward that runs, None for every token."""


def choice_functions(
    layers: list[MoELayer], plan: SteeringPlan, scope_mask: ScopeMask, audit: Audit
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
        functions[layer] = _function(
            layer, choices, plan.scope if entries else None, asked[0].scope if asked else None, scope_mask, audit
        )
    return functions


def _function(
    layer: MoELayer,
    choices: dict[tuple[bool, bool], Choice],
    scope: str | None,
    k_scope: str | None,
    scope_mask: ScopeMask,
    audit: Audit,
) -> Callable[[tuple[Any, ...], dict[str, Any], Any], Routed]:
    """``scope``: where experts are forced or biased; ``k_scope``: where k is another; None: nowhere."""

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
        after = before
        for mask_T, choice in parts(len(before.ids_TK), before.ids_TK.device):
            after = merge(layer, after, rerouted(layer, choice, args, kwargs), mask_T)
        audit.count_choice(
            layer.index,
            layer.num_experts,
            before.ids_TK.long(),
            after.selected_TK(layer.num_experts).long(),
            (scope_mask(scope) if scope else None, scope_mask(k_scope) if k_scope else None),
        )
        return after

    return function
