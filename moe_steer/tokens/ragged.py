"""Scopes of rows that lie one behind the other without padding, as serving engines batch them: a whole prompt beside pieces of
prompts and single tokens. And the arithmetic of scopes that padded batches (``positions``) share.

Everything is done on the device of the tokens, for all rows at once; what a row needs of its past is three numbers (``RowState``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_steer.thinking import ANSWER, THOUGHT, TokenTags
from moe_steer.tokens.scopes import Scope, SpecialTokens, parse_scope
from moe_steer.tokens.steps import ANY_STOP, BLANK_LINE, LINE, ONLY_SPACE, StepEnds, sentence_ends


class RowState(NamedTuple):
    """What R rows have behind them: phase (``moe_steer.thinking``), bits of the last token, and the last N tokens (-1: none)."""

    phase_R: Tensor
    bits_R: Tensor
    tail_RN: Tensor

    @classmethod
    def of_new_rows(cls, num_rows: int, special: SpecialTokens | None, device: torch.device | str = "cpu") -> RowState:
        """Of rows without tokens. N: one less than the tokens of the longest tag."""
        longest = len(special.tags.forms[0][0]) if special is not None and special.tags is not None else 1
        zeros_R = torch.zeros(num_rows, dtype=torch.long, device=device)
        return cls(zeros_R, zeros_R.clone(), torch.full((num_rows, longest - 1), -1, device=device))


class Batch(NamedTuple):
    """T tokens of R rows: each row's number of tokens (at least 1), its tokens before these, and the tokens of its prompt."""

    count_R: Tensor
    before_R: Tensor
    prompt_R: Tensor
    row_T: Tensor
    """The row of each token."""
    offset_T: Tensor
    """Its place among the row's tokens of this batch."""

    @classmethod
    def of(cls, count_R: Tensor, before_R: Tensor, prompt_R: Tensor, num_tokens: int) -> Batch:
        """``num_tokens``: the sum of ``count_R``, which must not be read from a device that runs behind."""
        row_T = torch.repeat_interleave(count_R, output_size=num_tokens)
        start_R = count_R.cumsum(0) - count_R
        offset_T = torch.arange(num_tokens, device=count_R.device) - start_R[row_T]
        return cls(count_R, before_R, prompt_R, row_T, offset_T)


class RaggedScopes:
    """Which tokens are in which of some scopes, batch after batch. (Whether the scopes fit the tokenizer: ``PositionTracker``.)"""

    def __init__(
        self, scopes: Sequence[str], special: SpecialTokens | None, device: torch.device | str = "cpu"
    ) -> None:
        self._scopes = [parse_scope(text) for text in scopes]
        self.follows_tags = any(scope.kind in ("thought", "answer", "step_end") for scope in self._scopes)
        self._tags = special.tags if special is not None else None
        self._classes_V = None
        if self.follows_tags:
            assert special is not None
            self._classes_V = torch.tensor([*special.classes, 0], device=device)  # the last: ids beyond the tokenizer

    def masks(self, batch: Batch, ids_T: Tensor, state: RowState) -> tuple[Tensor, RowState]:
        """bool [scopes, T], and the state after the batch. ``ids_T`` and ``state`` are read for thoughts and steps alone."""
        number_T = batch.before_R[batch.row_T] + batch.offset_T - batch.prompt_R[batch.row_T]  # of the generated token
        if not self.follows_tags:
            return torch.stack([_simple(scope, number_T) for scope in self._scopes]), state
        lines = _Lines(batch, len(ids_T))
        started_T, tail_RN = self._started(batch, ids_T, state.tail_RN)
        assert self._classes_V is not None
        bits_T = self._classes_V[ids_T.clamp(max=len(self._classes_V) - 1)]
        real_1S = lines.spread(torch.ones_like(ids_T, dtype=torch.bool))[:, 1:]
        started_1S = lines.spread(started_T)[:, 1:]
        phase_1C = lines.carried(state.phase_R, started_1S - 1, real_1S & (started_1S > 0))
        ends = sentence_ends(state.bits_R, lines.spread(bits_T)[:, 1:], real_1S, lines.carried)
        number_1S = lines.spread(number_T)[:, 1:]
        thought_1S = number_1S >= 0 if self._tags is None else phase_1C[:, 1:] == THOUGHT
        found = []
        for scope in self._scopes:
            if scope.kind in ("all", "prompt", "generated", "after"):
                found.append(_simple(scope, number_T))
            else:
                found.append(in_scope(scope, number_1S, thought_1S, phase_1C, ends)[0, lines.place_T - 1])
        last_R = lines.place_T[batch.count_R.cumsum(0) - 1]
        return torch.stack(found), RowState(phase_1C[0, last_R], ends.bits_BT[0, last_R], tail_RN)

    def _started(self, batch: Batch, ids_T: Tensor, tail_RN: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, longest = tail_RN.shape
        if self._tags is None:
            return torch.zeros_like(ids_T), tail_RN
        # Every row's tail, then its tokens.
        end_R = batch.count_R.cumsum(0)
        window = ids_T.new_empty(len(ids_T) + num_rows * longest)
        place_T = torch.arange(len(ids_T), device=ids_T.device) + (batch.row_T + 1) * longest
        window[place_T] = ids_T
        tail_at_RN = torch.arange(num_rows * longest, device=ids_T.device).view(num_rows, longest)
        window[tail_at_RN + (end_R - batch.count_R)[:, None]] = tail_RN.to(window.dtype)
        started_T = started_phases(self._tags, lambda places: window[place_T - places])
        return started_T, window[tail_at_RN + end_R[:, None]].to(tail_RN.dtype)


class _Lines:
    """All rows in one line of C = T + R columns: before its tokens, each row has a column with the state that it brings."""

    def __init__(self, batch: Batch, num_tokens: int) -> None:
        numbers_T = torch.arange(num_tokens, device=batch.row_T.device)
        self.place_T = numbers_T + batch.row_T + 1
        self._state_R = (
            batch.count_R.cumsum(0) - batch.count_R + torch.arange(len(batch.count_R), device=batch.row_T.device)
        )
        self._columns_C = torch.arange(num_tokens + len(batch.count_R), device=batch.row_T.device)

    def spread(self, value_T: Tensor) -> Tensor:
        """[1, C]: the tokens' values, 0 in the columns of states."""
        line = value_T.new_zeros(len(self._columns_C))
        line[self.place_T] = value_T
        return line[None]

    def carried(self, before_R: Tensor, value_1S: Tensor, counts_1S: Tensor) -> Tensor:
        """[1, C], S = C - 1: in the column of each token the row's latest value that counts, in that of a state ``before_R``."""
        value_C, counts_C = (
            before_R.new_empty(len(self._columns_C)),
            torch.empty_like(self._columns_C, dtype=torch.bool),
        )
        value_C[1:], counts_C[1:] = value_1S[0].to(before_R.dtype), counts_1S[0]
        value_C[self._state_R], counts_C[self._state_R] = before_R, True
        place_C = torch.where(counts_C, self._columns_C, 0).cummax(0).values
        return value_C[place_C][None]


def _simple(scope: Scope, number_T: Tensor) -> Tensor:
    return torch.ones_like(number_T, dtype=torch.bool) if scope.kind == "all" else in_scope(scope, number_T)


def started_phases(tags: TokenTags, back: Callable[[int], Tensor]) -> Tensor:
    """1 + the phase that starts with each token, the last one of a tag; 0 where it starts none. ``back``: the tokens so many
    places before each."""
    started = torch.zeros_like(back(0))
    for form, phase, _ in reversed(tags.forms):  # the longest last: it wins over its own ending
        found = torch.ones_like(started, dtype=torch.bool)
        for places, token in enumerate(reversed(form)):
            found = found & (back(places) == token)
        started = torch.where(found, phase + 1, started)
    return started


def in_scope(
    scope: Scope,
    number_BS: Tensor,
    thought_BS: Tensor | None = None,
    phase_BT: Tensor | None = None,
    ends: StepEnds | None = None,
) -> Tensor:
    """Which tokens are in any scope but ``all``. ``number_BS``: of the generated token, below 0 in the prompt; T = 1 + S columns."""
    if scope.kind == "prompt":
        return number_BS < 0
    if scope.kind in ("generated", "after"):
        return number_BS >= scope.skip
    assert phase_BT is not None
    if scope.kind == "answer":
        return phase_BT[:, 1:] == ANSWER
    assert thought_BS is not None
    if scope.kind == "thought":
        return thought_BS
    assert ends is not None
    bits_BS, last_BS = ends.bits_BT[:, 1:], ends.bits_BT[:, :-1]
    ends_BS = torch.zeros_like(thought_BS)
    if "sentence" in scope.classes:
        ends_BS = ends_BS | ends.sentence_BS
    if "stop" in scope.classes:
        ends_BS = ends_BS | ((bits_BS & ANY_STOP) > 0)
    if "line" in scope.classes:
        ends_BS = ends_BS | ((bits_BS & LINE) > 0)
    if "paragraph" in scope.classes:
        empty_BS = (bits_BS & (LINE | ONLY_SPACE)) == (LINE | ONLY_SPACE)
        ends_BS = ends_BS | ((bits_BS & BLANK_LINE) > 0) | (empty_BS & ((last_BS & LINE) > 0))
    return thought_BS & ends_BS
