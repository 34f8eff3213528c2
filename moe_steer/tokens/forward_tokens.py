"""The tokens of a forward as they enter the decoder, for those who keep a state of their own for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moe_steer.tokens.cache_rows import Rows


class Tokens:
    """What is known of a forward's tokens when it begins. ``real_BS``: None where none is padding."""

    def __init__(
        self,
        shape: tuple[int, int],
        ids_BS: Tensor | None,
        real_BS: Tensor | None,
        rows: Rows,
        mask: Callable[[str], Tensor | None],
        has_prompt: bool,
    ) -> None:
        self.shape, self.ids_BS, self.mask = shape, ids_BS, mask
        self.has_prompt = has_prompt
        """Whether a token of it may be of a prompt."""
        self.device = rows.seen_B.device
        self._real_BS, self._rows = real_BS, rows
        self._number_BS: Tensor | None = None

    @property
    def real_BS(self) -> Tensor:
        """bool [B, S]: no padding."""
        if self._real_BS is None:
            self._real_BS = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return self._real_BS

    @property
    def number_BS(self) -> Tensor:
        """Of the generated token, below 0 in the prompt."""
        if self._number_BS is None:
            before_B = self._rows.seen_B - self._rows.prompt_B
            if self._real_BS is None and self.shape[1] == 1:
                self._number_BS = before_B[:, None]
            else:
                self._number_BS = before_B[:, None] + self.real_BS.cumsum(1) - 1
        return self._number_BS

    def seen_B(self) -> Tensor:
        """Real tokens of each row behind the forward."""
        return self._rows.seen_B + (self.shape[1] if self._real_BS is None else self._real_BS.sum(1))

    def scope_BS(self, scope: str) -> Tensor:
        """The tokens of a scope."""
        mask_T = self.mask(scope)
        return self.real_BS if mask_T is None else mask_T.view(self.real_BS.shape)


class Follower(Protocol):
    """Keeps a state of its own for each row, on the cache (``Rows.gates``)."""

    def begin(self, tokens: Tokens, rows: Rows) -> None:
        """Take the tokens of a forward and the rows as they were before it."""

    def end(self) -> Mapping[str, Tensor]:
        """The rows' state behind the forward."""
