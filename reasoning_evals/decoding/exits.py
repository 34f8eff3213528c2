"""Rules that end a thought early: where a trial answer is sure (DEER), or where a probe's reading of the model's state says that the answer is there. What they are shown of the decode loop is ``Drawn`` (``reasoning_evals.engines.decoder``)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.forms import Form, check_vocabulary, checked_forms, open_thought


class TrialAnswer(Protocol):
    """What a row would write next, greedily, after a text of somebody else's; the row itself does not see it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The answer's tokens."""

    @property
    def probabilities(self) -> Sequence[float]:
        """Of each token, at temperature 1 and without other rules."""


class Drawn(Protocol):
    """A step of the decode loop, between the draw and the writing of the tokens."""

    @property
    def ids_BT(self) -> Tensor:
        """What is written so far."""

    @property
    def drawn_B(self) -> Tensor:
        """The tokens that would be written next."""

    @property
    def free_B(self) -> Tensor:
        """Whether the row's next token is its own, and not one of a text that is being written into it."""

    @property
    def generated_B(self) -> Tensor:
        """The row's tokens that no prompt holds."""

    def trial(self, rows: Sequence[int], text: Form, most: int, ends: Any) -> Sequence[TrialAnswer]:
        """Greedy answers of these rows behind ``text``, up to ``most`` tokens, each until ``ends(token_ids)``."""


@dataclass(frozen=True, kw_only=True)
class TrialExit(LogitsProcessor):
    """DEER (arXiv 2504.15895): a thought ends at a switch word where the answer that it already has is sure.

    Where a switch word (a form of one token) is drawn in an open thought, before it is written: the row is copied, ``trial`` is
    written behind the thought, and an answer is taken greedily, until the brace that the trial opened is closed (without
    an open brace: until a line break), for at most ``most_tokens``. Its confidence is the geometric mean of the
    probabilities of its tokens, the closing one included, at temperature 1. At ``threshold`` or more the closing tag is written in
    place of the word, and the model goes on from there; else the word is written, as if nothing had been asked. An answer
    that is not closed in time is not sure. In a thought that holds ``most_trials`` switch words nothing is asked any more.

    The authors' release takes the mean over the tokens but the first, samples the trial, and offers the arithmetic mean as well.
    """

    forms: tuple[Form, ...]
    """One-token forms of the switch words."""
    tags: TokenTags
    trial: Form
    """The tokens of the text that induces an answer."""
    texts: tuple[str, ...]
    """Token id -> its text."""
    threshold: float = 0.95
    """The paper's."""
    most_trials: int = 10
    """The release's."""
    most_tokens: int = 20
    """The release's."""
    counts: Counter[str] = field(default_factory=Counter, compare=False)
    """Trials, their tokens (the text that induces them included), and exits since this rule was made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", checked_forms(self.forms, "a switch word"))
        checked_forms([self.trial], "the text that asks for an answer")
        if longer := [list(form) for form in self.forms if len(form) > 1]:
            raise ValueError(f"the switch word {longer[0]} is several tokens: only a whole token can be held back")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the threshold is {self.threshold}: give a probability above 0, up to 1")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits as they are: the rule acts on what is drawn."""
        check_vocabulary([*self.forms, self.trial], scores)
        return scores

    def interject(self, step: Drawn) -> Mapping[int, Form]:
        """Row -> the closing tag, for the rows whose thought ends here."""
        switches_N = torch.tensor([form[0] for form in self.forms], device=step.drawn_B.device)
        inside_B, start_B = open_thought(step.ids_BT, self.tags)
        places_T = torch.arange(step.ids_BT.shape[1], device=start_B.device)
        said_B = (torch.isin(step.ids_BT, switches_N) & (places_T >= start_B[:, None])).sum(-1)
        asks_B = step.free_B & inside_B & torch.isin(step.drawn_B, switches_N) & (said_B < self.most_trials)
        rows = [int(row) for row in asks_B.nonzero()[:, 0]]
        if not rows:
            return {}
        answers = step.trial(rows, self.trial, self.most_tokens, self.is_closed)
        sure = {
            row: self.tags.close
            for row, answer in zip(rows, answers, strict=True)
            if self.confidence(answer) >= self.threshold
        }
        self.counts["trials"] += len(rows)
        self.counts["trial_tokens"] += sum(len(self.trial) + len(answer.token_ids) for answer in answers)
        self.counts["exits"] += len(sure)
        return sure

    def confidence(self, answer: TrialAnswer) -> float:
        """Geometric mean of the tokens' probabilities; 0 for an answer that is not closed."""
        if not self.is_closed(answer.token_ids):
            return 0.0
        logs = [math.log(max(probability, 1e-300)) for probability in answer.probabilities]
        return math.exp(math.fsum(logs) / len(logs))

    def is_closed(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer behind the trial text is complete."""
        depth = sum(_depth(self.texts[token]) for token in self.trial)
        known = len(self.texts)  # models have rows beyond the vocabulary, and may write them
        answer = "".join(self.texts[token] for token in token_ids if token < known)
        if depth <= 0:
            return "\n" in answer.lstrip()
        for letter in answer:
            depth += _depth(letter)
            if depth == 0:
                return True
        return False

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain JSON values."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("texts", "counts", "tags")]
        return {"rule": "trial_exit", **{name: getattr(self, name) for name in names}, "tags": self.tags.describe()}


def _depth(text: str) -> int:
    return text.count("{") - text.count("}")


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
