"""A budget that a thought is led to, not cut at: a reminder in the thought, a ramp on the closing tag, a grace, then the cut."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.budgets import check_budget
from reasoning_evals.decoding.forms import (
    Form,
    check_vocabulary,
    checked_forms,
    closing,
    only,
    open_thought,
)


@dataclass(frozen=True, kw_only=True)
class SoftBudget(LogitsProcessor):
    """A soft thinking budget. h is the number of tokens that the open thought holds, counted as ``ThinkingBudget`` counts.

    - h < N - R: the model is left alone.
    - N - R <= h < N, the ramp: the logit of the closing tag rises by peak * (h - (N - R) + 1) / R, so by the peak at the last
      token before N. Of a tag of several tokens it is the token with which the tag begins, or goes on where it has begun.
    - N <= h < N + G, the grace: the peak stays; once the thought's last token ends a step, the tag is the only token left.
    - h >= N + G: the tag is the only token left.

    Logits are raised before temperature. With R = 0 and G = 0 it is ``ThinkingBudget``.
    """

    num_tokens: int
    """N."""
    tags: TokenTags
    ramp: int
    """R, in tokens."""
    peak: float
    """In logits."""
    grace: int
    """G, in tokens."""
    step_ends: tuple[int, ...]
    """The tokens that end a step by their own text."""

    def __post_init__(self) -> None:
        check_budget(self.num_tokens)
        if not 0 <= self.ramp <= self.num_tokens or self.grace < 0:
            raise ValueError(
                f"the ramp is {self.ramp} and the grace {self.grace} tokens: give a ramp from 0 to the budget, {self.num_tokens}, and a "
                "grace of 0 or more"
            )
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise ValueError(f"the ramp's peak is {self.peak}: give a number of logits, 0 or more")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T]; the given tensor is not changed."""
        inside_B, held_B, begun_B, next_B = closing(input_ids, scores, self.tags)
        if self.ramp and self.peak:
            share_B = ((held_B - (self.num_tokens - self.ramp) + 1) / self.ramp).clamp(0, 1) * inside_B
            lifted_B1 = (scores.gather(1, next_B[:, None]) + self.peak * share_B[:, None]).to(scores.dtype)
            scores = scores.scatter(1, next_B[:, None], lifted_B1)
        over_B = inside_B & (held_B >= self.num_tokens)
        late_B = held_B >= self.num_tokens + self.grace
        return only(scores, over_B & (late_B | self._step_has_ended(input_ids, begun_B)), next_B)

    def _step_has_ended(self, ids_BT: Tensor, begun_B: Tensor) -> Tensor:
        """[B]: whether the last token before a begun tag ends a step."""
        place_B = (ids_BT.shape[1] - 1 - begun_B).clamp(min=0)
        ends_N = torch.tensor(self.step_ends, dtype=torch.long, device=ids_BT.device)
        return torch.isin(ids_BT.gather(1, place_B[:, None])[:, 0], ends_N)

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values; the step ends by their number."""
        settings = dataclasses.asdict(self) | {"tags": self.tags.describe(), "step_ends": len(self.step_ends)}
        return {"rule": "soft_budget", **settings}


@dataclass(frozen=True, kw_only=True)
class Reminder(LogitsProcessor):
    """A text that is written into the thought once it holds ``after`` tokens: each of its tokens is the only one left in turn.

    A thought that is closed earlier is not reminded; one that is opened again is reminded again. The reminder's tokens are
    tokens of the thought, and a budget counts them. A closing tag of several tokens that the model has begun there is interrupted.
    """

    after: int
    text: Form
    """The tokens of the text."""
    tags: TokenTags

    def __post_init__(self) -> None:
        checked_forms([self.text], "the reminder")
        if self.after < 1:
            raise ValueError(f"the reminder comes after {self.after} tokens of thought: give 1 or more")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T]; the given tensor is not changed."""
        check_vocabulary([self.text], scores)
        inside_B, start_B = open_thought(input_ids, self.tags)
        place_B = input_ids.shape[1] - start_B - self.after
        due_B = inside_B & (place_B >= 0) & (place_B < len(self.text))
        text_N = torch.tensor(self.text, device=scores.device)
        return only(scores, due_B, text_N[place_B.clamp(0, len(self.text) - 1)])

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        return {"rule": "reminder", **dataclasses.asdict(self), "tags": self.tags.describe()}
