"""Early exit by a trial answer (DEER): where the model is about to go on, it is asked for its answer, and a sure one ends the thought."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_steer.thinking import TokenTags
from reasoning_evals.decoding.drawn import Drawn, TrialAnswer
from reasoning_evals.decoding.forms import Form, check_vocabulary, checked_forms, open_thought


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
