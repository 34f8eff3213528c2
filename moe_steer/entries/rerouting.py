"""Run a router again with another choice: the family's own code, with what its top-k sees changed.

A router of any family makes logits with one linear map, masks groups where it has them, takes ``topk`` over the experts, and
gathers weights for the chosen ones. These calls are watched while its ``forward`` runs, and three of them are changed: a bias
is added to the logits; the last ``topk`` puts forced experts first and forbidden ones last, and takes another k; a mask leaves
the forced experts' own scores. So the weights come out of the family's own arithmetic over the experts chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_steer.layers import MoELayer

_MASKS = ("masked_fill", "masked_fill_")
_BEST_OF_GROUP = ("topk", "max", "amax")


@dataclass(frozen=True, eq=False)
class Choice:
    """What to change in one router's choice. ``k``: how many experts a token gets; ``logit_bias``: expert -> what is added to
    its logit."""

    k: int
    forced: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    parts: Mapping[int, Tensor] = field(default_factory=dict)
    """Expert -> factor [T] of its gate, 0 to 1: of the bias, and whether it is forced at all; experts without one act wholly."""

    def gated(self, parts: Mapping[int, Tensor]) -> Choice:
        """With the factors of this forward."""
        return dataclasses.replace(self, parts=parts) if parts else self


class _Rerouting(TorchFunctionMode):
    """Active while one router runs. ``ids_TK``: what its last top-k chose; None if there was none."""

    def __init__(self, layer: MoELayer, choice: Choice) -> None:
        super().__init__()
        self._layer = layer
        self._choice = choice
        self._num_experts = layer.num_experts
        # Inkling's router also makes the logits of its shared experts, behind those of the routed ones.
        weight = getattr(layer.router, "weight", None)
        self._logits = {self._num_experts, *([weight.shape[0]] if isinstance(weight, Tensor) and weight.ndim else [])}
        self.ids_TK: Tensor | None = None
        self.biased = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if name == "linear":
            return self._biased(func(*args, **kwargs))
        if not isinstance(first, Tensor):
            return func(*args, **kwargs)
        if name == "topk" and first.ndim == 2 and first.shape[-1] == self._num_experts:
            asked = kwargs.get("k", args[1] if len(args) > 1 else 0)
            if asked in (self._layer.top_k, self._choice.k):
                return self._chosen(first)
        if name in _MASKS and self._choice.forced:
            before = first.clone() if name.endswith("_") else first
            return self._unmasked(before, func(*args, **kwargs))
        if name in _BEST_OF_GROUP and self._choice.forbidden and (shape := self._groups(first)):
            # A group is worth what may be chosen in it.
            low = first.masked_fill(self._in_groups(self._choice.forbidden, first, shape), -torch.inf)
            return func(low, *args[1:], **kwargs) if args else func(**{**kwargs, "input": low})
        return func(*args, **kwargs)

    def _among(self, experts: tuple[int, ...], like: Tensor) -> Tensor:
        """bool [E]; with gates [T, E]."""
        mask_E = torch.zeros(self._num_experts, dtype=torch.bool)
        mask_E[list(experts)] = True
        mask_E = mask_E.to(like.device)
        gated = [expert for expert in experts if expert in self._choice.parts]
        if not gated:
            return mask_E
        mask_TE = mask_E.repeat(len(self._choice.parts[gated[0]]), 1)
        for expert in gated:
            mask_TE[:, expert] = self._choice.parts[expert].to(like.device) > 0
        return mask_TE

    def _in_groups(self, experts: tuple[int, ...], like: Tensor, shape: tuple[int, int]) -> Tensor:
        mask = self._among(experts, like)
        return mask.view(*mask.shape[:-1], *shape)

    def _groups(self, tensor: Tensor) -> tuple[int, int] | None:
        """(groups, experts of a group) of scores [T, groups, experts of a group]."""
        if tensor.ndim == 3 and tensor.shape[-2] * tensor.shape[-1] == self._num_experts:
            return tensor.shape[-2], tensor.shape[-1]
        return None

    def _biased(self, logits: Tensor) -> Tensor:
        if self.biased or not self._choice.logit_bias or logits.shape[-1] not in self._logits:
            return logits
        self.biased = True
        bias = torch.zeros(logits.shape[-1], dtype=torch.float64)
        for expert, value in self._choice.logit_bias.items():
            bias[expert] = value
        bias = bias.to(device=logits.device, dtype=logits.dtype)
        if any(expert in self._choice.parts for expert in self._choice.logit_bias):
            bias = bias.repeat(*logits.shape[:-1], 1)
            for expert in self._choice.logit_bias.keys() & self._choice.parts.keys():
                part_T = self._choice.parts[expert].to(device=logits.device, dtype=logits.dtype)
                bias[..., expert] *= part_T.view(logits.shape[:-1])
        return logits + bias

    def _unmasked(self, before: Tensor, after: Tensor) -> Tensor:
        forced = self._choice.forced
        if after.shape != before.shape or after.dtype == torch.bool:
            return after
        if after.shape[-1] == self._num_experts:
            return torch.where(self._among(forced, after), before, after)
        shape = self._groups(after)
        return after if shape is None else torch.where(self._in_groups(forced, after, shape), before, after)

    def _chosen(self, scores_TE: Tensor) -> Any:
        """The k best, forced ones first and forbidden ones behind all others, groups that were masked included."""
        key_TE = scores_TE
        if self._choice.forced or self._choice.forbidden:
            key_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).min)
            for experts, value in ((self._choice.forced, torch.inf), (self._choice.forbidden, -torch.inf)):
                if experts:
                    key_TE = key_TE.masked_fill(self._among(experts, key_TE), value)
        self.ids_TK = key_TE.topk(self._choice.k, dim=-1).indices
        return torch.return_types.topk((scores_TE.gather(-1, self.ids_TK), self.ids_TK))  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router returned, and in it the ids and weights [T, K]. ``unused_TK``: places that hold no selection, with weight
    0 and the id of an expert that the token did not choose; None: every place is a selection.

    In Llama-4 ids are in no output, and the weights are scores [T, E].
    """

    output: tuple[Any, ...]
    ids_TK: Tensor
    unused_TK: Tensor | None = None

    def selected_TK(self, num_experts: int) -> Tensor:
        """The ids, with ``num_experts`` in unused places."""
        return self.ids_TK if self.unused_TK is None else self.ids_TK.masked_fill(self.unused_TK, num_experts)


def as_routed(layer: MoELayer, output: Any) -> Routed:
    """What the router of ``layer`` returned by itself."""
    if layer.input_scaled:
        return Routed(tuple(output), output[1].topk(layer.top_k, dim=-1).indices)
    ids, _ = _places(layer, output)
    return Routed(tuple(output), output[ids])


def rerouted(layer: MoELayer, choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
    """Run the router again, every token under ``choice``; RuntimeError when its choice is not made as described above."""
    router: Any = layer.router
    mode = _Rerouting(layer, choice)
    with mode, _other_k(router, choice.k):
        output = router.forward(*args, **kwargs)
    if mode.ids_TK is None or (choice.logit_bias and not mode.biased):
        raise RuntimeError(
            f"the choice of {layer.name} cannot be reached: its {type(router).__name__} is of an unknown build, so use gains alone"
        )
    if layer.input_scaled:
        return Routed(tuple(output), mode.ids_TK)
    ids, _ = _places(layer, output)
    return Routed(tuple(output), output[ids])


@contextmanager
def _other_k(router: Any, k: int) -> Iterator[None]:
    """Let a router that keeps its k beside it cut what it has gathered for ``k`` experts (Inkling's does)."""
    own = vars(router).get("top_k")
    if own is None or own == k:
        yield
        return
    router.top_k = k
    try:
        yield
    finally:
        router.top_k = own


def merge(layer: MoELayer, kept: Routed, new: Routed, mask_T: Tensor | None) -> Routed:
    """``new`` for the tokens of the mask (all of them without one), ``kept`` for the others, as wide as the wider one."""
    if mask_T is None:
        return new
    mask_T1 = mask_T.to(kept.ids_TK.device)[:, None]
    width = max(kept.ids_TK.shape[-1], new.ids_TK.shape[-1])
    kept, new = _widened(layer, kept, width), _widened(layer, new, width)
    unused_TK = None
    if kept.unused_TK is not None or new.unused_TK is not None:
        unused_TK = torch.where(mask_T1, _unused(new), _unused(kept))
    ids_TK = torch.where(mask_T1, new.ids_TK, kept.ids_TK)
    output = [
        torch.where(mask_T1, b, a) if isinstance(a, Tensor) and a.ndim == 2 and a.shape == b.shape else a
        for a, b in zip(kept.output, new.output, strict=True)
    ]
    if layer.weights_first:  # AutoEP's third value: tokens per expert [E]
        counts_E = torch.bincount(ids_TK.flatten(), minlength=layer.num_experts)
        output[2] = counts_E.to(output[2].dtype)
    return Routed(tuple(output), ids_TK, unused_TK)


def _unused(routed: Routed) -> Tensor:
    return torch.zeros_like(routed.ids_TK, dtype=torch.bool) if routed.unused_TK is None else routed.unused_TK


def _widened(layer: MoELayer, routed: Routed, width: int) -> Routed:
    """With unused places up to ``width``, whose ids the token did not choose: an id twice would confuse dispatchers."""
    more = width - routed.ids_TK.shape[-1]
    if not more:
        return routed
    ids_TK = routed.ids_TK
    free_TE = torch.ones((len(ids_TK), layer.num_experts), device=ids_TK.device).scatter(-1, ids_TK.long(), 0.0)
    ids = torch.cat([ids_TK, free_TE.topk(more, dim=-1).indices.to(ids_TK.dtype)], -1)
    unused = torch.cat([_unused(routed), torch.ones_like(ids[:, :more], dtype=torch.bool)], -1)
    if layer.input_scaled:
        return Routed(routed.output, ids, unused)
    output = list(routed.output)
    at_ids, at_weights = _places(layer, routed.output)
    weights_TK = output[at_weights]
    output[at_ids] = ids
    output[at_weights] = torch.cat([weights_TK, weights_TK.new_zeros((len(ids), more))], -1)
    return Routed(tuple(output), ids, unused)


def _places(layer: MoELayer, output: Any) -> tuple[int, int]:
    """Where the ids and the weights are in a router's output: the ids are whole numbers, the weights stand beside them."""
    if isinstance(output, tuple):
        found = [
            at
            for at, value in enumerate(output)
            if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
        ]
        for at in (found[0] - 1, found[0] + 1) if len(found) == 1 else ():
            if 0 <= at < len(output) and isinstance(output[at], Tensor) and output[at].shape == output[found[0]].shape:
                return found[0], at
    raise RuntimeError(
        f"the choice of {layer.name} cannot be reached: its router returns no ids and weights, so use gains alone"
    )
