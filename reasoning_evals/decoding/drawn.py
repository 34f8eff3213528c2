"""What a rule that ends thoughts is shown of the decode loop (``reasoning_evals.engines.interjections``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from reasoning_evals.decoding.forms import Form


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
