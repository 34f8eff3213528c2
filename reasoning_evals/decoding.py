"""Decoding rules that papers compare steering with, as transformers' LogitsProcessors.

- NoWait (``Ban``): words that are never written.
- TIP (``SwitchPenalty``): a penalty on the words that switch thoughts, while a thought is young.
- A thinking budget (``ThinkingBudget``): the closing tag is forced once the thought is too long.
- Forced continuation (``Continuation``): a word takes the place of the closing tag while the thought is too short.

A rule keeps no state. Everything it needs it reads from the ids generated so far, at every step anew, so rows may leave the
batch at any time. Ids are [B, T]: left-padded prompts, then what was generated. The padding may be any id that is not part
of a tag or a form; positions are only used as differences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags

Form = tuple[int, ...]

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


class OpenThought(NamedTuple):
    """For each row: whether the next token belongs to a thought, and the position after the tag that opened it."""

    inside_B: Tensor
    start_B: Tensor


def open_thought(ids_BT: Tensor, tags: TokenTags) -> OpenThought:
    """The last tag of a row decides, whether prompt or model wrote it. Only what begins an answer ends a thought: in harmony
    the end of one message may be followed by another thought."""
    start_B = last_end(ids_BT, tags.opening)
    return OpenThought(start_B > last_end(ids_BT, tags.answering), start_B)


def last_end(ids_BT: Tensor, forms: Iterable[Form]) -> Tensor:
    """[B]: the position after the last occurrence of any of the forms; 0 where there is none.

    >>> last_end(torch.tensor([[5, 7, 5, 6], [6, 6, 6, 6]]), [(7, 5)]).tolist()
    [3, 0]
    """
    return _last(ids_BT, [(form, len(form)) for form in forms])


def last_start(ids_BT: Tensor, forms: Iterable[Form]) -> Tensor:
    """[B]: the position of the first token of the last occurrence of any of the forms; -1 where there is none."""
    return _last(ids_BT, [(form, 1) for form in forms]) - 1


def ends_with(ids_BT: Tensor, form: Form) -> Tensor:
    """[B]: whether the ids so far end with the form; every row ends with the empty one."""
    batch, length = ids_BT.shape
    if len(form) > length:
        return torch.zeros(batch, dtype=torch.bool, device=ids_BT.device)
    return (ids_BT[:, length - len(form) :] == torch.tensor(form, dtype=torch.long, device=ids_BT.device)).all(-1)


def completed_by(ids_BT: Tensor, forms: Sequence[Form]) -> tuple[Tensor, Tensor]:
    """The tokens that would complete a form as the next token: distinct ids [N], and [B, N] whether in this row."""
    ends = sorted({form[-1] for form in forms})
    would_BN = torch.zeros(ids_BT.shape[0], len(ends), dtype=torch.bool, device=ids_BT.device)
    would_BN[:, sorted({ends.index(form[0]) for form in forms if len(form) == 1})] = True
    for form in forms:
        if len(form) > 1:
            would_BN[:, ends.index(form[-1])] |= ends_with(ids_BT, form[:-1])
    return torch.tensor(ends, dtype=torch.long, device=ids_BT.device), would_BN


def checked_forms(forms: Iterable[Iterable[int]], what: str) -> tuple[Form, ...]:
    """Sorted, without duplicates; ValueError for none, for an empty form, or for a negative id."""
    found = tuple(sorted({tuple(int(token) for token in form) for form in forms}))
    if not found or () in found or any(token < 0 for form in found for token in form):
        raise ValueError(f"{what} has the token forms {[list(form) for form in found]}: give non-empty ids >= 0")
    return found


def check_vocabulary(forms: Iterable[Form], scores_BV: Tensor) -> None:
    """ValueError when an id is beyond the logits: the forms belong to another tokenizer."""
    largest = max(token for form in forms for token in form)
    if largest >= scores_BV.shape[-1]:
        raise ValueError(
            f"token id {largest} is beyond the {scores_BV.shape[-1]} logits: take the ids from this model's tokenizer"
        )


def _last(ids_BT: Tensor, anchored: Iterable[tuple[Form, int]]) -> Tensor:
    """1 + the position of the anchor-th token of the last occurrence of any form; 0 where there is none."""
    batch, length = ids_BT.shape
    best_B = torch.zeros(batch, dtype=torch.long, device=ids_BT.device)
    for form, anchor in anchored:
        width = length - len(form) + 1
        if width < 1:
            continue
        here_BW = ids_BT[:, :width] == form[0]
        for offset, token in enumerate(form[1:], 1):
            here_BW = here_BW & (ids_BT[:, offset : offset + width] == token)
        places_W = torch.arange(anchor, anchor + width, device=ids_BT.device)
        best_B = torch.maximum(best_B, (here_BW * places_W).amax(-1))
    return best_B


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
        if self.num_tokens < 0:
            raise ValueError(f"the thinking budget is {self.num_tokens} tokens: give 0 (no thought) or more")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token after ``input_ids`` [B, T]; the given tensor is not changed."""
        close = self.tags.close
        check_vocabulary([close], scores)
        inside_B, start_B = open_thought(input_ids, self.tags)
        held_B = input_ids.shape[1] - start_B
        # Tokens of the closing tag that are already there: the longest prefix of it with which the ids end.
        begun_B = torch.zeros_like(held_B)
        for length in range(1, len(close)):
            begun_B[ends_with(input_ids, close[:length])] = length
        begun_B = torch.minimum(begun_B, held_B)
        spent_B = inside_B & (held_B - begun_B >= self.num_tokens)
        if not bool(spent_B.any()):
            return scores
        forced_B1 = torch.tensor(close, device=scores.device)[begun_B][:, None]
        forced_BV = scores.masked_fill(spent_B[:, None], float("-inf"))
        kept_B1 = forced_BV.gather(1, forced_B1).masked_fill(spent_B[:, None], 0.0)
        return forced_BV.scatter_(1, forced_B1, kept_B1)

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
