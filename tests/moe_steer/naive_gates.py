"""Second opinion on gates: one row, one token at a time, every number and state in plain Python.

A token is processed under an ungated plan that holds only what is open at it, with what a ramp leaves of it: nothing here knows of
batches, padding, caches' rows or tensors of states. What probes read is taken from a forward of its own, layer by layer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import naive_scopes
import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, observe_residual, steer
from moe_steer.gates.conditions import Condition, When

WAIT = 33


class WordTokenizer(tiny.TinyTokenizer):
    """With a token for "Wait"."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [WAIT] if "Wait" in text else [tiny.VOCAB - 1]

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        texts = super().batch_decode(rows, skip_special_tokens)
        return ["Wait" if row == [WAIT] else text for row, text in zip(rows, texts, strict=True)]


class NaiveGate:
    """A gate, advanced token by token. ``opened``: how often it has opened; ``tokens``: at how many it was open."""

    def __init__(self, when: When) -> None:
        self.when = when
        self.open = [False] * len(when.conditions)
        self.count = self.opened = self.tokens = 0

    def advance(self, values: Sequence[float | None]) -> float:
        """The factor at the next token; values of its conditions there, None: not known."""
        for i, (one, value) in enumerate(zip(self.when.conditions, values, strict=True)):
            if value is None:
                continue
            if one.above is not None:
                until = one.above if one.until is None else one.until
                self.open[i] = value >= one.above or (self.open[i] and value >= until)
            else:
                assert one.below is not None
                until = one.below if one.until is None else one.until
                self.open[i] = value <= one.below or (self.open[i] and value <= until)
        is_open = all(self.open) if self.when.joined == "all" else any(self.open)
        self.opened += is_open and not self.count
        self.count = self.count + 1 if is_open else 0
        self.tokens += is_open
        return min(1.0, self.count / self.when.ramp)


def loop_length(ids: Sequence[int], copies: int, period: int) -> int:
    """The longest ending that repeats at most ``period`` tokens at least ``copies`` times, by trying all."""
    found = 0
    for p in range(1, period + 1):
        length = p
        while length < len(ids) and ids[len(ids) - 1 - length] == ids[len(ids) - 1 - length + p]:
            length += 1
        if length >= copies * p and length <= len(ids):
            found = max(found, length)
    return found


@dataclass
class NaiveGatedRow:
    """One row under a plan with gates."""

    model: Any
    plan: SteeringPlan
    prompt: int
    ids: list[int] = field(default_factory=list)
    cache: Any = None
    logits: Tensor | None = None
    ends: dict[str, float] = field(default_factory=dict)
    gates: dict[When, NaiveGate] = field(default_factory=dict)
    acted: dict[int, int] = field(default_factory=dict)
    done: list[list[float]] = field(default_factory=list)
    """Of each entry, experts first: the tokens at which it acted, and what it added."""
    told: list[list[dict[str, Any]]] = field(default_factory=list)
    """After each token, of each gated entry what ``Audit.to_samples`` is to say."""

    def feed(self, token: int) -> Tensor:
        """Process one token: its logits [V]."""
        self.ids.append(token)
        self.cache = DynamicCache(config=self.model.config) if self.cache is None else self.cache
        entries: list[Any] = [*self.plan.experts, *self.plan.residual]
        probed: dict[str, float] = {}
        factors: dict[When, float] = {}

        def known(when: When) -> bool:
            return all(one.file in probed for one in when.conditions if one.file)

        def decide() -> None:
            for when in dict.fromkeys(entry.when for entry in entries if entry.when is not None):
                if when not in factors and known(when):
                    gate = self.gates.setdefault(when, NaiveGate(when))
                    factors[when] = gate.advance([self.value(one, probed) for one in when.conditions])

        decide()
        files = {one.file for entry in entries if entry.when for one in entry.when.conditions if one.file}
        for file in sorted(files, key=lambda file: self.plan.probe(file).layer):
            probe = self.plan.probe(file)
            read: list[Tensor] = []
            with observe_residual(self.model, [probe.layer], lambda _, hidden, read=read: read.append(hidden)):
                self.run(factors, copy.deepcopy(self.cache))
            odds = float(read[0][0, -1].double() @ probe.weight_D.double()) + probe.bias
            probed[file] = 1 / (1 + math.exp(-odds))
            decide()
        if len(self.ids) == self.prompt:
            self.ends = dict(probed)
        self.logits = self.run(factors, self.cache)
        self.told.append([self.tell(place) for place, entry in enumerate(entries) if entry.when is not None])
        return self.logits

    def tell(self, place: int) -> dict[str, Any]:
        """Of one entry what it has done so far."""
        entries: list[Any] = [*self.plan.experts, *self.plan.residual]
        gate, (tokens, added) = self.gates[entries[place].when], self.done[place]
        name = "weight_added" if place < len(self.plan.experts) else "norm_added"
        return {"row": place, "openings": gate.opened, "open_tokens": gate.tokens, "tokens": tokens, name: added}

    def run(self, factors: Mapping[When, float], cache: Any) -> Tensor:
        """The newest token under what is open."""

        def here(entry: Any, scope: str) -> float:
            if not naive_scopes.in_scope(scope, self.ids, self.prompt):
                return 0.0
            return 1.0 if entry.when is None else factors.get(entry.when, 0.0)

        experts = []
        for entry in self.plan.experts:
            part = here(entry, self.plan.scope)
            if part:
                bias = {"logit_bias": part * entry.logit_bias} if entry.logit_bias else {}
                gain = 1 + part * (entry.gain - 1)
                experts.append(ExpertGain(entry.layer, entry.expert, gain, entry.force, **bias))
        residual = []
        for number, entry in enumerate(self.plan.residual):
            part = here(entry, entry.scope)
            if cache is self.cache:
                self.acted[number] = self.acted.get(number, 0) + (part > 0)
            if part:
                residual.append(dataclasses.replace(entry, strength=part * entry.strength, when=None, scope="all"))
        plan = SteeringPlan(
            experts=experts, residual=residual, renormalize=self.plan.renormalize, base_dir=self.plan.base_dir
        )
        with torch.no_grad(), steer(self.model, plan, quiet=True) as audit:
            out = self.model(torch.tensor([[self.ids[-1]]]), past_key_values=cache, use_cache=True)
        if cache is self.cache:
            places = {(one.layer, one.expert): place for place, one in enumerate(self.plan.experts)}
            self.done = self.done or [[0, 0.0] for _ in (*places, *self.plan.residual)]
            for row in audit.to_rows():
                if row["kind"] == "expert":
                    self.add(places[row["layer"], row["expert"]], row["tokens"], row["weight_added"])
            for number, entry in enumerate(self.plan.residual):
                part = here(entry, entry.scope)
                self.add(len(places) + number, part > 0, part * float(self.plan.load_shift(entry).norm()))
        return out.logits[0, -1]

    def add(self, place: int, tokens: int, added: float) -> None:
        """Count what an entry did at one token."""
        self.done[place][0] += tokens
        self.done[place][1] += added

    def value(self, one: Condition, probed: Mapping[str, float]) -> float | None:
        """A condition's number at the newest token."""
        generated = self.ids[self.prompt :]
        before = self.ids[:-1]
        if one.on == "probe":
            return probed[one.file]
        if one.on in ("entropy", "margin", "difficulty") and not generated:
            return None
        if one.on == "difficulty":
            return self.ends[one.file]
        if one.on in ("entropy", "margin"):
            assert self.logits is not None
            shares = sorted(self.logits.double().softmax(-1).tolist(), reverse=True)
            return shares[0] - shares[1] if one.on == "margin" else -sum(p * math.log(p) for p in shares if p)
        if one.on == "loop":
            return loop_length(generated, one.copies, one.period)
        places = range(1, len(self.ids) + 1)
        if one.on == "spent":
            return sum(naive_scopes.in_scope("thought", before[:end], 0) for end in places if end <= len(before))
        count = 0
        for end in places:
            count += naive_scopes.in_scope("step_end:paragraph", self.ids[:end], 0)
            count = 0 if self.ids[end - 1] == WAIT else count
        return count


__all__ = ["NaiveGate", "NaiveGatedRow", "ResidualVector", "WordTokenizer", "loop_length"]
