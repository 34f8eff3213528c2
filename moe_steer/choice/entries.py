"""The part of a plan that changes which experts are chosen, and whether it fits a model.

``force`` and ``logit_bias`` are said on an expert's entry, ``top_k`` on its own:

    "experts": [{"layer": 3, "expert": 17, "force": "in", "gain": 2.0},
                {"layer": 3, "expert": 4, "force": "out"},
                {"layer": 5, "expert": 9, "logit_bias": 1.5}],
    "top_k": [{"layer": 3, "k": 4, "scope": "thought"}]

- in: every token in the plan's scope selects the expert, with the weight that its own score has among the k chosen, after the
  family's own normalisation. It takes the place of the last of the k; where routing is limited to groups, the groups are chosen
  as without it, and it is chosen even where its group was not.
- out: no token in scope selects it; the next best takes its place. Its score does not count for its group either.
- logit_bias: added to the logit that the router's linear map gives, before softmax, sigmoid, soft-capping or the correction
  bias. It moves choice and weight alike: under softmax all weights as far as the family normalises over them, under sigmoid
  (with a correction bias or not) the expert's own score, sigmoid(logit + bias), and through it the normalised weights.
- top_k: so many experts a token at that layer, in its own scope; the family's normalisation runs over these.
- Gains multiply the weights that come out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_steer.entries.expert_entry import ExpertGain, check_index, check_moe_layer
from moe_steer.json_files import quoted
from moe_steer.tokens import parse_scope

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape

TOP_K_KEYS = ("layer", "k", "scope")


@dataclass(frozen=True, slots=True)
class TopK:
    """Let every token of ``scope`` have ``k`` experts at ``layer`` (absolute, 0-based), in place of the model's number."""

    layer: int
    k: int
    scope: str = "all"

    def __post_init__(self) -> None:
        check_index("layer", self.layer, self)
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(
                f"k of the top_k entry at layer {self.layer} is {quoted(self.k)}: give a whole number >= 1"
            )
        parse_scope(self.scope)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: getattr(self, key) for key in TOP_K_KEYS}


def check_choice(experts: Sequence[ExpertGain], top_k: Sequence[TopK], model: Any, shape: ModelShape) -> None:
    """ValueError, in one line, where entries ask for a choice that a model of ``shape`` cannot make, or cannot be made to make.

    ``model``: the model itself, or again a shape, from which less is known.
    """
    for entry in top_k:
        check_moe_layer(entry.layer, "top_k entry", shape)
    choosing = [entry for entry in experts if entry.acts_on_choice]
    named = {entry.layer for entry in choosing} | {entry.layer for entry in top_k}
    if not named:
        return
    from moe_steer.layers import (
        choice_by_type,
        choice_refusal,
        moe_layers,
    )  # which needs torch, and plans of gains do not

    reason = choice_by_type(shape.model_type)
    if reason:
        raise ValueError(f"the choice of experts of {shape.model_type} cannot be changed: {reason}; use gains alone")
    if model is not shape:
        for layer in moe_layers(model):
            wants_k = any(entry.layer == layer.index and entry.k != layer.top_k for entry in top_k)
            reason = choice_refusal(layer, wants_k) if layer.index in named else ""
            if reason:
                raise ValueError(f"the choice at layer {layer.index} of {shape.model_type} cannot be changed: {reason}")
    model_k = getattr(shape, "top_k", 0)  # the shape of a checkpoint's files does not know it
    for index in sorted(named):
        forced = [entry.expert for entry in choosing if entry.layer == index and entry.force == "in"]
        forbidden = [entry.expert for entry in choosing if entry.layer == index and entry.force == "out"]
        asked = [entry for entry in top_k if entry.layer == index]
        counts = [entry.k for entry in asked]
        if model_k and not (asked and asked[0].scope == "all"):
            counts.append(model_k)
        if counts and len(forced) > min(counts):
            raise ValueError(
                f"layer {index}: {len(forced)} experts are forced in, and a token has {min(counts)}: force at most so many"
            )
        if counts and shape.num_experts - len(forbidden) < max(counts):
            raise ValueError(
                f"layer {index}: {len(forbidden)} of {shape.num_experts} experts are forced out, and a token needs {max(counts)}: force out fewer, or give a smaller k"
            )
