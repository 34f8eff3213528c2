"""Early exit on a probe: where a step of the thought has ended, a reading of the model's state says whether the answer is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.drawn import Drawn
from reasoning_evals.decoding.forms import Form, check_vocabulary, open_thought


@dataclass(frozen=True, kw_only=True)
class ProbeExit(LogitsProcessor):
    """A thought ends at the first exit point at which the probe says more than the threshold: the closing tag is written in place of
    the token that was drawn.

    An exit point is a generated token of an open thought that ends a step, every ``every``-th of the thought. What the probe reads
    belongs to that token, so the decision is taken before the next one.
    """

    tags: TokenTags
    step_ends: tuple[int, ...]
    """The tokens that end a step by their own text."""
    every: int
    threshold: float
    read: Callable[[], Tensor]
    """The probabilities [B] that the probe gives at the last token of each row of the last forward."""
    about: Mapping[str, Any]
    """The probe and its calibration, as plain JSON values: part of what the rule is."""
    counts: Counter[str] = field(default_factory=Counter, compare=False)
    """Readings and exits since this rule was made."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits as they are: the rule acts on what is drawn."""
        check_vocabulary([self.tags.close], scores)
        return scores

    def interject(self, step: Drawn) -> Mapping[int, Form]:
        """Row -> the closing tag, for the rows whose thought ends here."""
        at_B = step.free_B & (step.generated_B > 0) & self.is_point(step.ids_BT)
        rows = at_B.nonzero()[:, 0]
        if not len(rows):
            return {}
        sure = rows[self.read().to(rows.device)[rows] > self.threshold]
        self.counts["readings"] += len(rows)
        self.counts["exits"] += len(sure)
        return {int(row): self.tags.close for row in sure}

    def is_point(self, ids_BT: Tensor) -> Tensor:
        """[B]: whether the last token of a row is an exit point, if it was generated."""
        ends_N = torch.tensor(self.step_ends, dtype=torch.long, device=ids_BT.device)
        inside_B, start_B = open_thought(ids_BT, self.tags)
        ends_BT = torch.isin(ids_BT, ends_N) & (torch.arange(ids_BT.shape[1], device=ids_BT.device) >= start_B[:, None])
        return inside_B & ends_BT[:, -1] & (ends_BT.sum(-1) % self.every == 0)

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        settings = {"every": self.every, "threshold": self.threshold, "step_ends": len(self.step_ends)}
        return {"rule": "probe_exit", **settings, **self.about, "tags": self.tags.describe()}


def exit_points(
    token_ids: Sequence[int], first: int, start: int, stop: int, step_ends: Sequence[int], every: int
) -> list[int]:
    """The exit points of a thought that is written: ``token_ids[start:stop]``, of which the model wrote those from ``first`` on.

    >>> exit_points([9, 4, 5, 4, 6, 4, 4], 2, 1, 7, [4], 2)
    [3, 6]
    """
    ends = [place for place in range(start, stop) if token_ids[place] in set(step_ends)]
    return [place for number, place in enumerate(ends, 1) if number % every == 0 and place >= first]
