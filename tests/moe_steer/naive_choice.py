"""Second opinion on forced experts, biased logits and another k: the published routing rules, told what to choose.

``told`` changes the two places of ``routing_rules`` where something is chosen; the arithmetic around them stays. ``biased`` puts
a bias on logits as one more column of the router's matrix, against an input that is always 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

import routing_rules
from routing_rules import RouterCall, Vector


@contextmanager
def told(
    num_experts: int, *, forced: Sequence[int] = (), forbidden: Sequence[int] = (), k: int | None = None
) -> Iterator[None]:
    """Inside, every rule puts ``forced`` experts first and ``forbidden`` ones behind all others, and takes ``k``."""
    plain_best, plain_outside = routing_rules.best, routing_rules.outside_best_groups

    def best(scores: Vector, count: int) -> list[int]:
        if len(scores) != num_experts:
            return plain_best(scores, count)
        order = sorted(range(len(scores)), key=lambda i: (i in forbidden, i not in forced, -scores[i]))
        return order[: k or count]

    def outside(scores_E: Vector, num_groups: int, kept: int, members: int) -> list[int]:
        allowed_E = np.array([-np.inf if e in forbidden else score for e, score in enumerate(scores_E)])
        return [e for e in plain_outside(allowed_E, num_groups, kept, members) if e not in forced]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_rules, "best", best)
        patch.setattr(routing_rules, "outside_best_groups", outside)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BiasedCall(RouterCall):
    """A call whose router has one more input, which is always 1."""

    logit_bias: Mapping[int, float]

    def array(self, path: str) -> Vector:
        found = RouterCall.array(self, path)
        if found.ndim != 2 or found.shape[1] != self.hidden_TD.shape[1] - 1:
            return found
        column = np.zeros(len(found))
        for expert, value in self.logit_bias.items():
            column[expert] = value
        return np.column_stack([found, column])


def biased(call: RouterCall, logit_bias: Mapping[int, float]) -> RouterCall:
    """The call with a bias on some experts' logits."""
    ones = np.ones((len(call.hidden_TD), 1))
    values = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    return BiasedCall(**{**values, "hidden_TD": np.hstack([call.hidden_TD, ones])}, logit_bias=logit_bias)
