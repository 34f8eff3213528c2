"""Plans as tables on the device, and the two functions that read them in a forward: of a router and of a decoder layer.

Every tensor is a buffer of the module that reads it, with one address and shape for the life of the server: a captured or compiled
graph reads whatever the batch in hand has written there. Row 0 of each table is the plan that changes nothing. What is read by row and
expert lies flat, one operation a lookup, with one more cell at its end that changes nothing: there an id of -1 in row 0 ends up, which
is the engine's padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_steer import SteeringPlan
from moe_steer_vllm.choosing import Routing, Rule, choose
from moe_steer_vllm.served import channels, entries


@dataclass
class TokenRows:
    """What the tokens of a batch run under, N places. ``rows_CN``: by channel (a plan's first, second ... scope) the plan's number
    where the token is in that scope, else 0; ``base_N``: where the counts of its request begin in ``hits``."""

    rows_CN: Tensor
    dose_N: Tensor
    base_N: Tensor
    hits: Tensor
    """[slots * width + N]: hits of each entry in each slot, column 0 for none; behind them a place for every token that is not
    steered, so that these do not wait for one address."""
    spare_N: Tensor
    width: int
    """Entries of all plans, and column 0."""
    eager: bool = False
    """Every forward runs this code: nothing is compiled, captured or replayed."""
    written: int = 0
    """Places that may not be neutral."""

    @classmethod
    def of(
        cls, plans: Sequence[SteeringPlan], num_tokens: int, slots: int, device: torch.device | str, eager: bool = False
    ) -> TokenRows:
        """Neutral, for batches of ``num_tokens`` at most."""
        num_channels = max((len(channels(plan)) for plan in plans), default=1)
        width = 1 + sum(len(entries(plan)) for plan in plans)
        numbers = functools.partial(torch.zeros, dtype=torch.long, device=device)
        spare_N = torch.arange(num_tokens, device=device) + slots * width
        return cls(
            rows_CN=numbers(num_channels, num_tokens),
            dose_N=torch.ones(num_tokens, dtype=torch.float32, device=device),
            base_N=spare_N.clone(),
            hits=numbers(slots * width + num_tokens),
            spare_N=spare_N,
            width=width,
            eager=eager,
        )

    @property
    def idle(self) -> bool:
        """Nothing needs to be read: no token of the batch is steered, and this is asked anew in each forward."""
        return self.eager and not self.written

    def give(self, module: nn.Module) -> None:
        """Make them buffers of a module."""
        read = {
            "rows_CN": self.rows_CN,
            "dose_N1": self.dose_N[:, None],
            "base_N1": self.base_N[:, None],
            "hits": self.hits,
        }
        for name, tensor in read.items():
            module.register_buffer(f"steer_{name}", tensor, persistent=False)
        for name, one in (("one", self.hits), ("whole", self.dose_N)):
            module.register_buffer(f"steer_{name}", torch.ones_like(one[:1]), persistent=False)

    def clear(self, start: int, stop: int) -> None:
        """Let the rows of some places say that no token is steered."""
        self.rows_CN[:, start:stop] = 0
        self.base_N[start:stop] = self.spare_N[start:stop]

    def counts(self) -> Tensor:
        """[slots, width]: the hits as a table, in the same memory."""
        return self.hits[: len(self.hits) - len(self.spare_N)].view(-1, self.width)


def first_columns(plans: Sequence[SteeringPlan]) -> list[int]:
    """The column of each plan's first entry."""
    found, column = [], 1
    for plan in plans:
        found.append(column)
        column += len(entries(plan))
    return found


def steer_router(
    runner: Any,
    router: Any,
    layer: int,
    plans: Sequence[SteeringPlan],
    tokens: TokenRows,
    rule: Callable[[], Rule],
) -> None:
    """Let the entries of one layer act in its router. ``rule``: asked where experts are forced; its ValueError is let through."""
    num_experts = runner.moe_config.num_logical_experts
    # The ids of fused shared experts come behind those of all replicas (EPLB), which are no ids of a router.
    num_ids = router.global_num_experts + int(getattr(router, "num_fused_shared_experts", 0) or 0)
    shape, device = (len(plans) + 1, num_ids), tokens.hits.device
    gain, bias, force = torch.ones(shape), torch.zeros(shape), torch.zeros(shape)
    after, before = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    scoped: dict[int, list[int]] = {}
    rescales = torch.zeros(len(plans) + 1, dtype=torch.bool)
    for row, (plan, first) in enumerate(zip(plans, first_columns(plans), strict=True), 1):
        rescales[row] = plan.renormalize
        for column, entry in enumerate(plan.active_experts, first):
            if entry.layer == layer:
                at = (row, entry.expert)
                gain[at], bias[at] = entry.gain, entry.logit_bias
                force[at] = {"in": 1.0, "out": -1.0}.get(entry.force or "", 0.0)
                if entry.logit_bias:  # acts on every token in scope, whatever that selects
                    scoped.setdefault(row, []).append(column)
                else:
                    (before if entry.force == "out" else after)[at] = column
    if rescales.any() and num_ids > router.global_num_experts:
        raise ValueError(
            f"the weights of layer {layer} hold those of its fused shared experts, which no plan may rescale: leave renormalize out, or serve without fused shared experts"
        )
    tokens.give(runner)
    forced = bool(force.any())
    tables = {"gain": _flat(gain, 1.0), "after": _flat(after, 0)}
    tables |= {"bias": bias[:, :num_experts], "scoped": _marks(scoped, shape[0])} if scoped else {}
    tables |= {"force": force[:, :num_experts], "before": _flat(before, 0)} if forced else {}
    tables |= {"rescales": rescales} if rescales.any() else {}
    for name, table in tables.items():
        runner.register_buffer(f"steer_{name}", table.to(device), persistent=False)
    router._compute_routing = _steered(
        runner, router._compute_routing, tokens, num_ids, tables, rule() if forced else None
    )


def _flat(table_PE: Tensor, neutral: float) -> Tensor:
    return torch.cat([table_PE.flatten(), torch.full_like(table_PE[0, :1], neutral)])


def _steered(
    runner: Any, compute: Routing, tokens: TokenRows, num_ids: int, tables: dict[str, Tensor], rule: Rule | None
) -> Routing:
    """What takes the place of a router's ``_compute_routing``."""
    biased, rescaled = "bias" in tables, "rescales" in tables

    def compute_routing(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        if tokens.idle:
            return compute(hidden_states, router_logits, indices_type, **more)
        num_tokens = router_logits.shape[0]
        rows_T = runner.steer_rows_CN[0, :num_tokens]
        dose_T1 = runner.steer_dose_N1[:num_tokens]
        if biased:
            router_logits = router_logits + (runner.steer_bias[rows_T] * dose_T1).to(router_logits.dtype)
            _count(runner, runner.steer_scoped[rows_T])
        weights_TK, ids_TK = compute(hidden_states, router_logits, indices_type, **more)
        rows_T1 = rows_T[:, None]
        if rule is not None:
            _count(runner, runner.steer_before.take(torch.add(ids_TK, rows_T1, alpha=num_ids)))
            force_TE = runner.steer_force[rows_T]
            told_weights, told_ids = choose(rule, router_logits, force_TE)
            told_T1 = (force_TE != 0).any(-1, keepdim=True)
            weights_TK = torch.where(told_T1, told_weights.to(weights_TK.dtype), weights_TK)
            ids_TK = torch.where(told_T1, told_ids.to(ids_TK.dtype), ids_TK)
        at_TK = torch.add(ids_TK, rows_T1, alpha=num_ids)
        _count(runner, runner.steer_after.take(at_TK))
        gain_TK = torch.lerp(runner.steer_whole, runner.steer_gain.take(at_TK), dose_T1)
        new_TK = weights_TK * gain_TK.to(weights_TK.dtype)
        if rescaled:
            sums = new_TK.sum(-1, keepdim=True)
            back = torch.where(sums > 0, weights_TK.sum(-1, keepdim=True) / sums, 1.0)
            new_TK = torch.where(runner.steer_rescales[rows_T1], new_TK * back, new_TK)
        return new_TK, ids_TK

    return compute_routing


def _marks(columns: dict[int, list[int]], num_rows: int) -> Tensor:
    """[plans, N]: the columns that each token of a plan counts in; 0 where it has fewer."""
    marks = torch.zeros(num_rows, max(map(len, columns.values())), dtype=torch.long)
    for row, found in columns.items():
        marks[row, : len(found)] = torch.tensor(found)
    return marks


def _count(module: Any, columns_TN: Tensor) -> None:
    """One hit for every token in each of its columns; 0 counts for nobody."""
    at = (module.steer_base_N1[: len(columns_TN)] + columns_TN).flatten()
    module.steer_hits.scatter_add_(0, at, module.steer_one.expand_as(at))


def steer_layer(layer: nn.Module, index: int, plans: Sequence[SteeringPlan], tokens: TokenRows) -> None:
    """Let the residual entries of one decoder layer act at its output."""
    shifts: dict[int, Tensor] = {}
    columns: dict[int, dict[int, list[int]]] = {}
    device = tokens.hits.device
    for row, (plan, first) in enumerate(zip(plans, first_columns(plans), strict=True), 1):
        scopes = channels(plan)
        for column, entry in enumerate(plan.active_residual, first + len(plan.active_experts)):
            if entry.layer == index:
                shift_D = plan.load_shift(entry)
                channel = scopes.index(entry.scope)
                # Several entries of one plan and scope: their sum is added, and each counts its tokens.
                table = shifts.setdefault(channel, torch.zeros(len(plans) + 1, len(shift_D), dtype=torch.float64))
                table[row] += shift_D
                columns.setdefault(channel, {}).setdefault(row, []).append(column)
    tokens.give(layer)
    reads = []
    for channel in sorted(shifts):
        layer.register_buffer(f"steer_shift_{channel}", shifts[channel].float().to(device), persistent=False)
        marks = _marks(columns[channel], len(plans) + 1).to(device)
        layer.register_buffer(f"steer_marks_{channel}", marks, persistent=False)
        reads.append(channel)
    layer.forward = _shifted(layer, layer.forward, tokens, reads)  # type: ignore[method-assign]


def _shifted(layer: Any, forward: Callable[..., Any], tokens: TokenRows, reads: list[int]) -> Callable[..., Any]:
    def steered(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        # vLLM's layers hand on (what this layer adds, the stream before it), whose sum is the residual stream, or the stream.
        hidden_TD = output[0] if isinstance(output, tuple) else output
        if hidden_TD.ndim != 2 or (isinstance(output, tuple) and output[1].shape != hidden_TD.shape):
            raise RuntimeError(
                f"{type(layer).__name__} does not return the residual stream as [tokens, width]: plans with residual vectors cannot be served on it"
            )
        if tokens.idle:  # after what has to be found out where the server starts
            return output
        num_tokens = hidden_TD.shape[0]
        dose_T1 = layer.steer_dose_N1[:num_tokens]
        for channel in reads:
            rows_T = layer.steer_rows_CN[channel, :num_tokens]
            shift_TD = getattr(layer, f"steer_shift_{channel}")[rows_T] * dose_T1
            hidden_TD = hidden_TD + shift_TD.to(hidden_TD.dtype)
            _count(layer, getattr(layer, f"steer_marks_{channel}")[rows_T])
        return (hidden_TD, *output[1:]) if isinstance(output, tuple) else hidden_TD

    return steered
