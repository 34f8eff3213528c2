"""From a plan to the functions that hooks call: on the residual stream and inside layers, token by token in scope, and on the choice of routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_steer.entries.audit import Audit
from moe_steer.entries.rerouting import Choice, Routed, as_routed, merge, rerouted
from moe_steer.entries.transform import Transform
from moe_steer.gates.conditions import Factors
from moe_steer.inside import head_of, place_of
from moe_steer.layers import MoELayer
from moe_steer.plan import SteeringPlan

ScopeMask = Callable[[str], Tensor | None]
"""scope -> mask_T of the forward that runs, None for every token."""
Acting = Callable[[Tensor], Tensor]


class _Entry(NamedTuple):
    """An entry that is ready. ``shift_D``: what it adds; None where it does something else, ``transform``."""

    number: int
    scope: str
    gate: int | None
    shift_D: Tensor | None
    transform: Transform | None
    head: int | None
    length: float
    """Of what it adds."""

    @property
    def width(self) -> int:
        """Of its vector."""
        vector = self.shift_D if self.transform is None else self.transform.unit_D
        assert vector is not None
        return len(vector)


def residual_functions(
    model: Any, plan: SteeringPlan, mask: ScopeMask, audit: Audit, gates: Factors | None
) -> tuple[dict[nn.Module, Acting], dict[nn.Module, Acting]]:
    """Functions of what modules return, and of what they are given."""
    outputs: dict[nn.Module, list[_Entry]] = {}
    inputs: dict[nn.Module, list[_Entry]] = {}
    heads: dict[nn.Module, int] = {}
    for index, entry in enumerate(plan.active_residual):
        place = place_of(model, entry.layer, entry.site)
        gate = None if gates is None or entry.when is None else gates.number_of(entry.when)
        adds = entry.do == "add"
        shift_D, transform = plan.load_shift(entry) if adds else None, None if adds else plan.load_transform(entry)
        length = 0.0 if shift_D is None else float(shift_D.norm())
        heads[place.module] = place.heads
        named = inputs if place.heads else outputs
        named.setdefault(place.module, []).append(
            _Entry(index, entry.scope, gate, shift_D, transform, entry.head, length)
        )

    def made(named: dict[nn.Module, list[_Entry]]) -> dict[nn.Module, Acting]:
        return {
            module: _residual_function(entries, heads[module], mask, audit, gates) for module, entries in named.items()
        }

    return made(outputs), made(inputs)


def _residual_function(
    entries: list[_Entry], heads: int, mask: ScopeMask, audit: Audit, gates: Factors | None
) -> Acting:
    ready: dict[tuple[int, torch.device, torch.dtype], Any] = {}

    def on(hidden: Tensor, entry: _Entry) -> Any:
        key = (entry.number, hidden.device, hidden.dtype)
        if key not in ready:
            ready[key] = entry.transform.to(hidden) if entry.transform is not None else _shift(entry, hidden)
        return ready[key]

    def acted(hidden: Tensor, entry: _Entry) -> Tensor:
        # A model may carry several streams a token, as [B, S, streams, D] or side by side: the entry acts on each.
        tokens = hidden.shape[:-1][:2]
        open_T, part_T = mask(entry.scope), None
        gated = gates is not None and entry.gate is not None
        if gates is not None and entry.gate is not None:
            open_T1, part_T = gates.opened(entry.gate), gates.factor(entry.gate)
            if open_T is not None:
                open_T1 = open_T1 & open_T[:, None]
                part_T = None if part_T is None else part_T * open_T1
            open_T = open_T1
        if open_T is None and entry.transform is None:
            audit.count_residual(entry.number, tokens.numel())
            return hidden + on(hidden, entry)  # type: ignore[no-any-return]

        def over(each_T: Tensor | None) -> Tensor | None:
            return None if each_T is None else each_T.to(hidden.device).reshape(*tokens, *(1,) * (hidden.ndim - 2))

        here, part = over(open_T), over(part_T)
        if entry.transform is not None:
            streams = hidden.unflatten(-1, (-1, entry.width))
            new, norm = on(hidden, entry)(streams, None if part is None else part[..., None])
            new = new.flatten(-2)
            norm = norm.sum(-1, keepdim=True)
            norm = norm if here is None else torch.where(here, norm, 0.0)
            if gated and open_T is not None:
                audit.count_gated(entry.number, open_T, norm.reshape(len(open_T), -1).sum(-1))
            else:
                audit.count_residual(entry.number, tokens.numel() if open_T is None else open_T.sum(), norm.sum())
        else:
            assert open_T is not None
            if gated:
                audit.count_gated(entry.number, open_T if part_T is None else part_T, entry.length)
            else:
                audit.count_residual(entry.number, open_T.sum())
            shift = on(hidden, entry)
            new = hidden + (shift if part is None else part.to(hidden.dtype) * shift)
        return new if here is None else torch.where(here, new, hidden)

    def function(hidden: Tensor) -> Tensor:
        for entry in entries:
            if entry.head is None:
                hidden = acted(hidden, entry)
                continue
            at = head_of(hidden, heads, entry.width, entry.head)
            parts = [hidden[..., : at.start], acted(hidden[..., at], entry), hidden[..., at.stop :]]
            hidden = torch.cat(parts, -1)
        return hidden

    return function


def _shift(entry: _Entry, hidden: Tensor) -> Tensor:
    assert entry.shift_D is not None
    return entry.shift_D.to(hidden).repeat(hidden.shape[-1] // entry.width)


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
        functions[layer] = _choice_function(layer, choices, scopes, scope_mask, audit, (gates, gated))
    return functions


def _choice_function(
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
