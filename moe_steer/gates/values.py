"""What conditions are on: a number for every token of a row, from what is known when that token is processed.

- probe              the probe's probability for the residual stream at this very token, at the output of its layer, before the plan's
  own entries at that output; so it can gate what acts at the output of its layer, and everything in later layers
- difficulty         the probe's probability at the last token of the prompt; known at generated tokens
- entropy, margin    of the model's distribution of next tokens that this token was drawn from: softmax of the logits that the
  forward of the token before gave (under the plan; before temperature, filters and rules of decoding). Entropy in nats; margin: the
  largest probability minus the second. Known at generated tokens, the first one included
- loop               tokens of the longest ending of the generated text so far, this token included, that is the same at most
  ``period`` tokens at least ``copies`` times one behind the other (the last may be cut); 0 without one
- spent              tokens of the thought before this one, the tag that opened it included
- paragraphs_since   ends of paragraphs in the thought (``step_end:paragraph``), up to this token, since the last token of the last
  ``word`` (in any of its token forms), or since the start where there was none

A number that is not known (NaN) neither opens nor closes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_steer.gates.conditions import Condition
from moe_steer.gates.probe import Probe
from moe_steer.tokens.cache_rows import Tokens
from moe_steer.tokens.positions import carried

State = dict[str, Tensor]
"""What a row carries from forward to forward, by name: tensors [B] or [B, N]. What decoding reads as it is has one column, [B, 1]."""


class Source(ABC):
    """One number a token. ``value_BS``: None until it is known in this forward."""

    def __init__(self) -> None:
        self.value_BS: Tensor | None = None

    def fresh(self, num_rows: int, device: torch.device) -> State:
        """The state of rows without tokens."""
        return {}

    @abstractmethod
    def begin(self, seen: Tokens, state: State) -> None:
        """Take the tokens of a forward, and the rows' state, which is replaced by that after them."""


class Probed(Source):
    """``probe`` and, with ``at_prompt_end``, ``difficulty``."""

    def __init__(self, probe: Probe, at_prompt_end: bool) -> None:
        super().__init__()
        self.probe, self._at_prompt_end = probe, at_prompt_end
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._seen: Tokens | None = None
        self._state: State = {}

    def fresh(self, num_rows: int, device: torch.device) -> State:
        return {"value_B1": torch.full((num_rows, 1), math.nan, device=device)} if self._at_prompt_end else {}

    def begin(self, seen: Tokens, state: State) -> None:
        self._seen, self._state = seen, state
        self.value_BS = None
        if self._at_prompt_end and not seen.has_prompt:
            self.value_BS = state["value_B1"]

    def read(self, hidden_BSD: Tensor) -> None:
        """Take the output of the probe's layer."""
        seen = self._seen
        if seen is None or self.value_BS is not None:
            return
        if hidden_BSD.ndim != 3:
            raise ValueError(
                f"layer {self.probe.layer} returns {list(hidden_BSD.shape)}: this family has no single residual stream to probe"
            )
        if (device := hidden_BSD.device) not in self._weights:
            self._weights[device] = (self.probe.weight_D.to(device), torch.full((1,), self.probe.bias, device=device))
        weight_D, bias_1 = self._weights[device]
        hidden_TD = hidden_BSD.detach().float().flatten(0, 1)
        value_BS = torch.addmv(bias_1, hidden_TD, weight_D).sigmoid_().view(seen.shape)
        value_BS = value_BS if device == seen.device else value_BS.to(seen.device)
        if self._at_prompt_end:
            ends_BS = seen.real_BS & (seen.number_BS == -1)
            columns_BT = carried(self._state["value_B1"][:, 0], value_BS, ends_BS)
            self._state["value_B1"] = columns_BT[:, -1:]
            value_BS = torch.where(seen.number_BS >= 0, columns_BT[:, 1:], math.nan)
        self.value_BS = value_BS


class Confidence(Source):
    """``entropy`` and ``margin``."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self._of = of

    def fresh(self, num_rows: int, device: torch.device) -> State:
        return {"value_B1": torch.full((num_rows, 1), math.nan, device=device)}

    def begin(self, seen: Tokens, state: State) -> None:
        if seen.shape[1] > 1 and bool(((seen.number_BS >= 0) & seen.real_BS).any()):
            raise ValueError(
                f"a gate on {self._of} reads the logits of the token before: feed generated tokens one by one through a cache, or "
                "gate on a probe"
            )
        value_BS = state["value_B1"]
        self.value_BS = torch.where(seen.number_BS >= 0, value_BS, math.nan) if seen.has_prompt else value_BS

    def of(self, logits_BV: Tensor) -> Tensor:
        """[B, 1], of the logits of the newest token."""
        if self._of == "margin":
            first_B2 = logits_BV.float().softmax(-1).topk(2, -1).values
            return first_B2[:, :1] - first_B2[:, 1:]
        # A share below exp(-200) is 0, and so is its part of the sum, also where a logit is -inf.
        logs_BV = logits_BV.float().log_softmax(-1).clamp_(min=-200.0)
        return logs_BV.exp().mul_(logs_BV).sum(-1, keepdim=True).neg_()


class Repeated(Source):
    """``loop``: for each period the number of tokens that equal the one so many places before, counted back from the newest."""

    def __init__(self, copies: int, period: int) -> None:
        super().__init__()
        self._period = period
        periods_P = torch.arange(1, period + 1)
        self._periods_P, self._least_P = periods_P, (copies - 1) * periods_P

    def fresh(self, num_rows: int, device: torch.device) -> State:
        size = (num_rows, self._period)
        same_BP = torch.zeros(size, dtype=torch.long, device=device)
        return {"last_BP": torch.full(size, -1, dtype=torch.long, device=device), "same_BP": same_BP}

    def begin(self, seen: Tokens, state: State) -> None:
        assert seen.ids_BS is not None
        if self._periods_P.device != seen.ids_BS.device:
            self._periods_P, self._least_P = (one.to(seen.ids_BS.device) for one in (self._periods_P, self._least_P))
        num_rows, length = seen.ids_BS.shape
        last_BP, same_BP = state["last_BP"], state["same_BP"]
        zeros_BS = torch.zeros((num_rows, length), device=seen.ids_BS.device)
        generated_BS = (seen.number_BS >= 0) & seen.real_BS if seen.has_prompt else None
        if generated_BS is not None and not bool(generated_BS.any()):
            self.value_BS = zeros_BS
            return
        values = []
        for column in range(length):
            token_B1 = seen.ids_BS[:, column : column + 1]
            new_BP = (same_BP + 1) * (last_BP == token_B1)
            longer_BP = torch.cat([token_B1, last_BP[:, :-1]], 1)
            if generated_BS is not None:
                counts_B1 = generated_BS[:, column : column + 1]
                new_BP, longer_BP = torch.where(counts_B1, new_BP, same_BP), torch.where(counts_B1, longer_BP, last_BP)
            last_BP, same_BP = longer_BP, new_BP
            values.append(((same_BP + self._periods_P) * (same_BP >= self._least_P)).amax(-1))
        state["last_BP"], state["same_BP"] = last_BP, same_BP
        self.value_BS = torch.stack(values, 1).float()
        if generated_BS is not None:
            self.value_BS = torch.where(generated_BS, self.value_BS, zeros_BS)


class Spent(Source):
    """``spent``."""

    def fresh(self, num_rows: int, device: torch.device) -> State:
        return {"count_B": torch.zeros(num_rows, dtype=torch.long, device=device)}

    def begin(self, seen: Tokens, state: State) -> None:
        thought_BS = seen.scope_BS("thought").long()
        count_BS = state["count_B"][:, None] + thought_BS.cumsum(1)
        state["count_B"] = count_BS[:, -1]
        self.value_BS = (count_BS - thought_BS).float()


class ParagraphsSince(Source):
    """``paragraphs_since``."""

    def __init__(self, forms: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._forms = [tuple(form) for form in forms]
        self._before = max(map(len, self._forms)) - 1

    def fresh(self, num_rows: int, device: torch.device) -> State:
        zeros_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        tail_BN = torch.full((num_rows, self._before), -1, dtype=torch.long, device=device)
        return {"count_B": zeros_B, "at_word_B": zeros_B.clone(), "tail_BN": tail_BN}

    def begin(self, seen: Tokens, state: State) -> None:
        assert seen.ids_BS is not None
        count_BS = state["count_B"][:, None] + seen.scope_BS("step_end:paragraph").long().cumsum(1)
        window_BT = torch.cat([state["tail_BN"], seen.ids_BS.where(seen.real_BS, -1)], 1)
        word_BS = torch.zeros_like(seen.real_BS)
        for form in self._forms:
            here_BS = torch.ones_like(seen.real_BS)
            for places, token in enumerate(reversed(form)):
                end = window_BT.shape[1] - places
                here_BS = here_BS & (window_BT[:, end - seen.real_BS.shape[1] : end] == token)
            word_BS = word_BS | here_BS
        at_word_BT = carried(state["at_word_B"], count_BS, word_BS & seen.real_BS)
        state["count_B"], state["at_word_B"] = count_BS[:, -1], at_word_BT[:, -1]
        state["tail_BN"] = window_BT[:, window_BT.shape[1] - self._before :]
        self.value_BS = (count_BS - at_word_BT[:, 1:]).float()


def source_of(condition: Condition, probe: Callable[[str], Probe], forms: Callable[[str], Sequence[Any]]) -> Source:
    """The source of a condition's numbers. ``probe``: the probe of a file; ``forms``: the token forms of a word."""
    if condition.on in ("probe", "difficulty"):
        return Probed(probe(condition.file), condition.on == "difficulty")
    if condition.on in ("entropy", "margin"):
        return Confidence(condition.on)
    if condition.on == "loop":
        return Repeated(condition.copies, condition.period)
    return Spent() if condition.on == "spent" else ParagraphsSince(forms(condition.word))
