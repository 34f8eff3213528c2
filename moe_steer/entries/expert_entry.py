"""Entries on experts: a gain, a say in the router's choice, another number of experts a token. And whether they fit a model.

``gain``, ``force`` and ``logit_bias`` are said on an expert's entry, ``top_k`` on its own:

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

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_steer.gates.conditions import When
from moe_steer.json_files import is_number, quoted
from moe_steer.tokens import parse_scope

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape


FORCES = ("in", "out")
EXPERT_KEYS = ("layer", "expert", "gain", "force", "logit_bias", "when")
"""What an expert's entry may hold in a plan file; of gain, force and logit_bias at least one."""
_NO_GAIN = float("nan")
_FLOAT32_MAX = 2.0**128 - 2.0**104


@dataclass(frozen=True, slots=True)
class ExpertGain:
    """Multiply the final gate weight of one expert, wherever the router selected it (RICE, arXiv 2505.14681, Eq. 7), and say
    whether the router selects it.

    ``layer`` is the absolute 0-based index among the decoder layers, ``expert`` the global expert id, ``gain`` a finite
    factor >= 0 (0 silences the expert's contribution; the selection itself does not change by it). ``force`` ("in" or "out")
    and ``logit_bias`` act on the choice before top-k: see ``moe_steer.entries.expert_entry``. With one of them the gain may be left out.
    ``when``: at which tokens of the plan's scope the entry acts (``moe_steer.gates.conditions``); on a ramp with a part of what it adds
    to a weight or logit, 1 + part * (gain - 1) and part * logit_bias.
    """

    layer: int
    expert: int
    gain: float = _NO_GAIN
    force: str | None = None
    logit_bias: float = 0.0
    when: When | None = None

    def __post_init__(self) -> None:
        check_index("layer", self.layer, self)
        check_index("expert", self.expert, self)
        where = f"layer {self.layer} expert {self.expert}"
        if self.force is not None and (not isinstance(self.force, str) or self.force not in FORCES):
            raise ValueError(f"force of {where} is {quoted(self.force)}: give 'in' or 'out'")
        check_finite(f"logit_bias of {where}", self.logit_bias)
        if self.gain is _NO_GAIN and (self.force or self.logit_bias):
            object.__setattr__(self, "gain", 1.0)
        check_finite(f"gain of {where}", self.gain, " >= 0")
        if self.force == "out" and (self.gain != 1.0 or self.logit_bias):
            raise ValueError(f"{where} is forced out and has a gain or logit_bias, which would act nowhere: keep one")
        if self.when is not None:
            object.__setattr__(self, "when", When.of(self.when))
            if self.force is not None and self.when.ramp > 1:
                raise ValueError(f"{where} is forced {self.force}, and that has no half: leave the ramp out")
        object.__setattr__(self, "gain", float(self.gain))
        object.__setattr__(self, "logit_bias", float(self.logit_bias))

    @property
    def acts_on_choice(self) -> bool:
        """Whether the entry acts before top-k."""
        return self.force is not None or self.logit_bias != 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether the entry changes nothing."""
        return self.gain == 1.0 and not self.acts_on_choice

    @property
    def action(self) -> str:
        """What is done to the expert, in short: 'x64', 'forced in x2', 'forced out', 'logit +1.5'."""
        parts = [f"forced {self.force}"] if self.force else []
        parts += [f"logit {self.logit_bias:+g}"] if self.logit_bias else []
        return " ".join([*parts, f"x{self.gain:g}"] if self.gain != 1.0 or not parts else parts)

    def dosed(self, dose: float) -> ExpertGain:
        """With ``dose`` times what the gain adds to a weight, 1 + dose * (gain - 1), and of the logit bias. ValueError for a
        gain below 0, and for an expert that is forced, which there is no half of."""
        where = f"layer {self.layer} expert {self.expert}"
        if self.force is not None and dose != 1.0:
            raise ValueError(f"{where} is forced {self.force}, and that has no dose: ask for the plan without one")
        gain = self.gain if dose == 1.0 else 1.0 + dose * (self.gain - 1.0)
        if gain < 0:
            raise ValueError(f"dose {dose:g} makes the gain {self.gain:g} of {where} {gain:g}: a gain is never below 0")
        return dataclasses.replace(self, gain=gain, logit_bias=dose * self.logit_bias)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not said is left out, so that plans of gains stay what they were."""
        values: dict[str, Any] = {"layer": self.layer, "expert": self.expert, "gain": self.gain}
        if self.force is not None:
            values["force"] = self.force
        if self.logit_bias:
            values["logit_bias"] = self.logit_bias
        return values if self.when is None else {**values, "when": self.when.to_dict()}

    def check(self, shape: ModelShape) -> None:
        """ValueError where the model has no such expert."""
        check_moe_layer(self.layer, f"expert {self.expert}", shape)
        if self.expert >= shape.num_experts:
            raise ValueError(
                f"expert {self.expert} at layer {self.layer} does not exist: this model has experts 0-{shape.num_experts - 1}, name one of them"
            )


def check_moe_layer(layer: int, what: str, shape: ModelShape) -> None:
    """ValueError where the model has no experts at ``layer``; ``what`` the plan names there."""
    if not shape.moe_layers:
        raise ValueError(
            f"the plan names experts, but {shape.model_type} is a dense model: use residual vectors, or a mixture-of-experts model"
        )
    if layer not in shape.moe_layers:
        raise ValueError(
            f"layer {layer} ({what}) has no experts in this model: layers with experts are {ranges(shape.moe_layers)}, name one of them"
        )


def check_index(name: str, value: object, owner: object) -> None:
    """ValueError for what is no whole number >= 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} of {type(owner).__name__} is {quoted(value)}: give a whole number >= 0")


def check_finite(what: str, value: Any, at_least: str = "") -> None:
    """ValueError for what is no finite number, below 0 where that is the least (`` >= 0``), or beyond the float32 in which models compute."""
    if not is_number(value) or (at_least and value < 0):
        raise ValueError(f"{what} is {quoted(value)}: give a finite number{at_least}")
    if abs(value) > _FLOAT32_MAX:
        raise ValueError(
            f"{what} is {value:g}, beyond float32, in which models compute: give at most {_FLOAT32_MAX:.2g}"
        )


def ranges(numbers: Sequence[int]) -> str:
    """'1-3, 5' for (1, 2, 3, 5)."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], -1]:
        if number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = number
    return ", ".join(parts)


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
