"""Rules on the length of a thought: it is cut (a budget), or goes on (forced continuation)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.forms import Form, check_vocabulary, closing, only, open_thought


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
