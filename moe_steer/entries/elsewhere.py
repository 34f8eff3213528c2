"""What of a plan only a model in this process can do: baked weights, control vectors and servers refuse it by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_steer.entries.expert_entry import ExpertGain
from moe_steer.entries.residual_entry import ResidualVector


class Entries(Protocol):
    """The part of a plan that matters here."""

    @property
    def experts(self) -> Sequence[ExpertGain]: ...

    @property
    def residual(self) -> Sequence[ResidualVector]: ...


def refuse_outside(plan: Entries, where: str) -> None:
    """ValueError for a plan with an entry that needs this process; ``where`` it was to go: 'a baked model', 'a server'."""
    named: list[tuple[ExpertGain | ResidualVector, str]] = [
        (one, f"expert {one.expert} at layer {one.layer}") for one in plan.experts
    ]
    named += [(one, f"{one.name} at layer {one.layer}") for one in plan.residual]
    for entry, name in named:
        if entry.when is not None:
            raise ValueError(
                f"{name} is gated (when: {entry.when}), which {where} cannot follow: take 'when' out, or steer in process "
                "('moe-steer generate', 'moe-steer evaluate', or steer() in Python)"
            )
        if isinstance(entry, ResidualVector) and not entry.only_adds:
            raise ValueError(
                f"{name} is to {entry.do} at the site {entry.site}, and {where} only adds at outputs of layers: take it out, or steer in "
                "process ('moe-steer generate', 'moe-steer evaluate', or steer() in Python)"
            )
