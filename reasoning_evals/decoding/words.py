"""Rules on words: a ban (NoWait), and a penalty on those that switch thoughts (TIP)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.forms import (
    Form,
    check_vocabulary,
    checked_forms,
    completed_by,
    last_start,
    open_thought,
)

NOWAIT_WORDS = (
    "wait",
    "alternatively",
    "hmm",
    "but",
    "however",
    "alternative",
    "another",
    "check",
    "double-check",
    "oh",
    "maybe",
    "verify",
    "other",
    "again",
    "now",
    "ah",
    "any",
)
"""The keywords of NoWait (arXiv 2506.08343)."""


@dataclass(frozen=True, kw_only=True)
class Ban(LogitsProcessor):
    """NoWait (arXiv 2506.08343): the logit of every token form of the banned words is -inf, in thought and answer alike.

    A form of several tokens is banned at its last token, and only if the tokens before it are already there (like
    transformers' ``bad_words_ids``); the paper bans single tokens only. A banned token is banned inside longer words too.
    """

    forms: tuple[Form, ...]
    """Token ids of the words, in all spellings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", checked_forms(self.forms, "a banned word"))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T]; the given tensor is not changed."""
        check_vocabulary(self.forms, scores)
        token_ids_N, would_BN = completed_by(input_ids, self.forms)
        return scores.index_copy(1, token_ids_N, scores[:, token_ids_N].masked_fill(would_BN, float("-inf")))

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        return {"rule": "ban", **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SwitchPenalty(LogitsProcessor):
    """Thought switching penalty (TIP, arXiv 2501.18585): inside the thought, z_v -= alpha for every switch token v
    while t < start + beta.

    ``start`` is where the current thought of the chain starts: after ``<think>``, or at the last switch word since then (a
    switch starts a thought, and the window with it); with ``restarts=False`` always after ``<think>``. t is the position of
    the token that is drawn, so exactly the tokens 0 .. beta - 1 of a thought are penalised.

    A form of several tokens is penalised at its last token, and only if the tokens before it are already there; the paper
    has single tokens only. With ``</think>`` as the form it is the variant in RICE's comparison (arXiv 2505.14681, Table 7,
    whose strength is not published): the thought is kept from ending early.
    """

    forms: tuple[Form, ...]
    """Token ids of the switch words, in all spellings."""
    tags: TokenTags
    alpha: float = 3.0
    """Subtracted from logits, before temperature. The default is the paper's choice, as is that of beta."""
    beta: int = 600
    """Length of the window, in tokens."""
    restarts: bool = True
    """Whether a switch word restarts the window."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", checked_forms(self.forms, "a switch word"))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}: give a number above 0, logits are lowered by it")
        if self.beta < 1:
            raise ValueError(f"beta is {self.beta}: give the length of the window in tokens, at least 1")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T], lowered; the given tensor is not changed."""
        check_vocabulary(self.forms, scores)
        inside_B, start_B = open_thought(input_ids, self.tags)
        if self.restarts:
            start_B = torch.maximum(start_B, last_start(input_ids, self.forms))
        young_B = inside_B & (input_ids.shape[1] - start_B < self.beta)
        token_ids_N, would_BN = completed_by(input_ids, self.forms)
        lowered_BN = scores[:, token_ids_N] - self.alpha * (would_BN & young_B[:, None])
        return scores.index_copy(1, token_ids_N, lowered_BN.to(scores.dtype))

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        return {"rule": "switch_penalty", **dataclasses.asdict(self), "tags": self.tags.describe()}
