"""State of each row of a batch, stored with the key-value cache, so that it follows when the cache's rows are selected or
reordered. And the tokens of a forward as they enter the decoder, for those who keep a state of their own for each row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_steer.inside import columns_of


@dataclass(frozen=True, eq=False, slots=True)
class RowName:
    """Who a row is, so that what happens in it can be counted: no two rows have one, wherever they move. A copy of a row, and one that is
    named anew, has another name with the old ones as ``parents``: what was before belongs to it too."""

    sample: Any = None
    """What the row's caller calls it; None where nobody did."""
    parents: tuple[RowName, ...] = ()
    apart: bool = False
    """A copy on which something is tried: no count of rows has it."""

    def copy(self) -> RowName:
        """The name of a copy of the row."""
        return dataclasses.replace(self, parents=(self,))

    def __deepcopy__(self, memo: dict[int, Any]) -> RowName:
        return self.copy()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """State per row of a cache: tensors [B]."""

    seen_B: Tensor
    """Real tokens so far."""
    prompt_B: Tensor
    """Real tokens of the prompt."""
    phase_B: Tensor
    """Phase (``moe_steer.thinking``): outside, in the thought, or in the answer."""
    bits_B: Tensor
    """Bits of the last real token (``moe_steer.tokens.steps``); 0 before the first."""
    tail_BN: Tensor
    """[B, N]: the last tokens, as many as a thinking tag may have before its last one; -1 where there was none."""
    forwards: int = 0
    """Number of forwards so far."""
    columns: int = 0
    """Of the cache, padding included, at most: more of them hold tokens that nobody followed."""
    follows_tags: bool = False
    """Whether phase and line were tracked from the first token on."""
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    """State of the gates of every ``steer`` block, by its own names: tensors [B] or [B, N]."""
    names: tuple[RowName, ...] = ()
    """Of each row, where there are gates."""

    def select(self, index: Tensor) -> Rows:
        """The state of other rows, in their order."""
        index = index.to(self.seen_B.device)
        chosen: dict[str, Any] = {name: tensor[index] for name, tensor in self._tensors()}
        gates = {name: tensor[index] for name, tensor in self.gates.items()}
        return dataclasses.replace(self, **chosen, gates=gates, names=self._names_of(index))

    def _names_of(self, index: Tensor) -> tuple[RowName, ...]:
        if not self.names:
            return ()
        rows = index.tolist()
        copied = {row for row, number in Counter(rows).items() if number > 1}
        return tuple(self.names[row].copy() if row in copied else self.names[row] for row in rows)

    def join(self, others: Sequence[Rows]) -> Rows:
        """The state of these rows, then of the others'; the number of forwards is that of these."""
        parts = [self, *others]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name, _ in self._tensors()
        }
        known = [name for name in self.gates if all(name in part.gates for part in others)]
        gates = {name: torch.cat([part.gates[name] for part in parts]) for name in known}
        names = tuple(name for part in parts for name in part.names) if all(part.names for part in parts) else ()
        follows_tags = all(part.follows_tags for part in parts)
        columns = max(part.columns for part in parts)
        return dataclasses.replace(self, **joined, gates=gates, names=names, follows_tags=follows_tags, columns=columns)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for item in dataclasses.fields(self):
            if isinstance(value := getattr(self, item.name), Tensor):
                yield item.name, value


class FollowsRows:
    """Mixed into a cache object: every operation on the cache's rows is applied to the rows' state too.

    ``keep_rows`` and ``add_rows`` are for code that moves the rows of the cache's layers itself, and calls them after it; ``name_rows`` for
    code that knows whose the rows are.
    """

    steering_rows: Rows | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._keep(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._keep(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.steering_rows is not None:
            num_rows = len(self.steering_rows.seen_B)
            self._keep(torch.arange(num_rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a plan with a scope cannot follow a cache that is cropped: turn assisted decoding off, or use scope all"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.steering_rows = None

    def keep_rows(self, indices: Tensor) -> None:
        """The cache now has these of its rows, in this order."""
        self._keep(indices)

    def add_rows(self, others: Sequence[Any]) -> None:
        """The rows of these caches were appended. If one was filled outside of ``steer``, the next forward refuses them all."""
        theirs = [rows for rows in map(rows_on, others) if rows is not None]
        known = self.steering_rows is not None and len(theirs) == len(others)
        self.steering_rows = self.steering_rows.join(theirs) if self.steering_rows is not None and known else None

    def name_rows(self, samples: Sequence[Any] | None) -> None:
        """Each row is of this sample; None: they are copies on which something is tried, and of none."""
        rows = self.steering_rows
        if rows is not None and rows.names:
            named = zip(rows.names, [None] * len(rows.names) if samples is None else samples, strict=True)
            names = tuple(RowName(sample, (name,), samples is None) for name, sample in named)
            self.steering_rows = dataclasses.replace(rows, names=names)

    def _keep(self, index: Tensor) -> None:
        if self.steering_rows is not None:
            self.steering_rows = self.steering_rows.select(index)


@functools.cache
def _following(kind: type) -> type:
    return type(kind.__name__, (FollowsRows, kind), {})


def leave_rows(cache: Any, rows: Rows) -> None:
    """Store the state of a finished forward on its cache.

    Nested ``steer`` blocks both do this: one that does not track the tags must not overwrite the state of the other.
    """
    if not isinstance(cache, FollowsRows):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
    others = cache.steering_rows
    nested = others is not None and others.forwards == rows.forwards
    if nested and others.gates:
        names = others.names
        if rows.names and rows.names != names:  # the first forward: each block has named the rows
            names = tuple(RowName(parents=both) for both in zip(names, rows.names, strict=True))
        rows = dataclasses.replace(rows, gates={**others.gates, **rows.gates}, names=names)
    if nested and others.follows_tags and not rows.follows_tags:
        rows = dataclasses.replace(
            rows, phase_B=others.phase_B, bits_B=others.bits_B, tail_BN=others.tail_BN, follows_tags=True
        )
    cache.steering_rows = rows


def rows_on(cache: Any) -> Rows | None:
    """The state that an earlier forward stored, or None."""
    return getattr(cache, "steering_rows", None)


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


def real_tokens(call: dict[str, Any], ids_BS: Tensor) -> tuple[bool, Tensor | None]:
    """Whether the attention mask of a call says which tokens are padding; and bool [B, S], the others (None: all of them).

    A static cache gets masks of what each token may look at, [B, 1, S, columns], perhaps one a kind of layer: padding may not even
    look at itself. Later tokens, one a forward, are never padding.
    """
    given, length = call.get("attention_mask"), ids_BS.shape[1]
    masks = [mask for mask in given.values() if mask is not None] if isinstance(given, dict) else [given]
    for mask in masks:
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
            return True, mask[:, -length:].to(ids_BS.device).bool()
        if isinstance(mask, Tensor) and mask.ndim == 4 and length == 1:
            return True, None
    wide = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 4]
    if not wide:
        return not masks or masks == [None], None
    past = columns_of(call)
    mask = max(wide, key=lambda one: one.shape[-1])  # of sliding layers: their window alone
    if mask.shape[-1] < past + length:
        return False, None
    own_BS = mask[:, 0].diagonal(past, 1, 2)[:, :length].expand(len(ids_BS), -1)
    return True, (own_BS if own_BS.dtype == torch.bool else own_BS == 0).to(ids_BS.device)
