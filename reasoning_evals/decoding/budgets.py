"""Rules on the length of a thought: it is cut (a budget), led to its end (a soft budget: a reminder, a ramp on the closing tag, a grace, then the cut), or goes on (forced continuation)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.forms import Form, check_vocabulary, checked_forms, closing, only, open_thought


def check_budget(num_tokens: int) -> None:
    """ValueError for a negative number."""
    if num_tokens < 0:
        raise ValueError(f"the thinking budget is {num_tokens} tokens: give 0 (no thought) or more")


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget(LogitsProcessor):
    """Budget forcing (s1, arXiv 2501.19393, its upper bound): once the open thought holds ``num_tokens`` tokens,
    ``</think>`` is the only token allowed, and the model continues from there to its answer.

    The budget counts the tokens after the last ``<think>``, including those of the prompt (the newline that R1's
    template ends with is one). A thought that is reopened after its end has a new budget. A closing tag of several
    tokens is completed, and its tokens are not counted.
    """

    num_tokens: int
    tags: TokenTags

    def __post_init__(self) -> None:
        check_budget(self.num_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T]; the given tensor is not changed."""
        inside_B, held_B, _, next_B = closing(input_ids, scores, self.tags)
        return only(scores, inside_B & (held_B >= self.num_tokens), next_B)

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        return {"rule": "thinking_budget", **dataclasses.asdict(self), "tags": self.tags.describe()}


@dataclass(frozen=True, kw_only=True)
class Continuation(LogitsProcessor):
    """Budget forcing (s1, arXiv 2501.19393, its lower bound): while the open thought holds fewer than ``num_tokens`` tokens, a
    closing tag that the model writes becomes the word "Wait".

    The token is drawn first and replaced then, so nothing else of the distribution changes, at any temperature. s1 says how
    often the tag is replaced; a length says the same without a memory of what was replaced, and is what a budget counts too.
    """

    num_tokens: int
    word: Form
    """The token of the word."""
    tags: TokenTags

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a thought goes on for at least {self.num_tokens} tokens: give 1 or more")
        if len(self.word) != 1:
            raise ValueError(
                f"the word that goes on a thought is {len(self.word)} tokens ({list(self.word)}) under this tokenizer: name one of one token"
            )
        if longer := [list(form) for form in self.tags.answering if len(form) > 1]:
            raise ValueError(
                f"the thought ends with a tag of several tokens ({longer[0]}) under this tokenizer, and only a whole token can be "
                "replaced: leave the rule out"
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits as they are: the rule acts on what is drawn."""
        check_vocabulary([self.word], scores)
        return scores

    def redirect(self, ids_BT: Tensor, drawn_B: Tensor) -> Tensor:
        """The tokens [B] that are written after ``ids_BT``, of those that were drawn."""
        inside_B, start_B = open_thought(ids_BT, self.tags)
        ends_N = torch.tensor([form[0] for form in self.tags.answering], device=drawn_B.device)
        early_B = inside_B & (ids_BT.shape[1] - start_B < self.num_tokens) & torch.isin(drawn_B, ends_N)
        return torch.where(early_B, torch.full_like(drawn_B, self.word[0]), drawn_B)

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        return {"rule": "continuation", **dataclasses.asdict(self), "tags": self.tags.describe()}


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
