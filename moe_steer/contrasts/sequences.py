"""``MarkedSequence``: tokens of one sequence, and which of them count for each side of a contrast; and their batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from moe_steer.layers import token_limits
from moe_steer.tokens import right_padded

_TOKENS = {"cpu": 1024}
_TOKENS_ELSEWHERE = 8192


@dataclass(frozen=True, slots=True)
class MarkedSequence:
    """Tokens of a sequence with the positions that count for the positive (wanted) and for the negative (unwanted) side.

    A pair of answers is two sequences with the same ``pair``, one with positive and one with negative positions; a
    contrast of decisions is one sequence with both.
    """

    name: str
    token_ids: tuple[int, ...]
    positive: tuple[int, ...] = ()
    negative: tuple[int, ...] = ()
    pair: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(int(token) for token in self.token_ids))
        if not self.name or not self.token_ids:
            raise ValueError(f"the sequence {self.name!r} has {len(self.token_ids)} tokens: give a name and tokens")
        for side in ("positive", "negative"):
            positions = tuple(int(position) for position in getattr(self, side))
            ordered = sorted(set(positions))
            if len(ordered) != len(positions) or (ordered and not 0 <= ordered[0] <= ordered[-1] < len(self.token_ids)):
                raise ValueError(
                    f"the {side} positions of {self.name!r} are {list(positions)[:8]}: give distinct ones from 0 to {len(self.token_ids) - 1}"
                )
            object.__setattr__(self, side, tuple(ordered))

    @property
    def needed(self) -> int:
        """Number of tokens up to the last marked one: later tokens cannot change it. 0 if none is marked."""
        return max(self.positive[-1:] + self.negative[-1:], default=-1) + 1

    def digest(self) -> int:
        """sha256 over everything but the name, as a number."""
        content = json.dumps([self.token_ids, self.positive, self.negative, self.pair is not None])
        return int.from_bytes(hashlib.sha256(content.encode()).digest(), "big")


def check_sequences(model: Any, sequences: Sequence[MarkedSequence]) -> None:
    """ValueError for a repeated name, tokens outside the vocabulary, and sequences longer than the model's
    context."""
    num_tokens, limit = token_limits(model)
    seen: set[str] = set()
    for item in sequences:
        if item.name in seen:
            raise ValueError(f"the sequence {item.name!r} occurs twice: it would be counted twice")
        seen.add(item.name)
        if not 0 <= min(item.token_ids) <= max(item.token_ids) < num_tokens:
            raise ValueError(
                f"the sequence {item.name!r} holds the token ids {min(item.token_ids)} to {max(item.token_ids)}, this model has 0-{num_tokens - 1}: it was made with another tokenizer"
            )
        if limit is not None and len(item.token_ids) > limit:
            raise ValueError(
                f"the sequence {item.name!r} has {len(item.token_ids)} tokens, this model's context {limit}: leave it out or cut it"
            )


def whole_pairs(sequences: Sequence[MarkedSequence]) -> tuple[list[MarkedSequence], int]:
    """The sequences without pairs that have an empty side, and the number of those pairs.

    The mean over no tokens is undefined: in the released code of STA one empty answer makes the whole vector NaN.
    """
    sides: dict[str, list[int]] = {}
    for item in sequences:
        if item.pair is not None:
            count = sides.setdefault(item.pair, [0, 0])
            count[0] += len(item.positive)
            count[1] += len(item.negative)
    empty = {pair for pair, count in sides.items() if 0 in count}
    return [item for item in sequences if item.pair not in empty], len(empty)


class Batchable(Protocol):
    """Anything ``batches`` can sort: a sequence, or several that share a row."""

    @property
    def name(self) -> str: ...
    @property
    def pair(self) -> str | None: ...
    @property
    def needed(self) -> int: ...


_Item = TypeVar("_Item", bound=Batchable)


def tokens_of_a_forward(asked: int | None, device: torch.device) -> int:
    """The requested number; by default 1,024 on a CPU, because larger batches do not fit its caches (they took up to 1.6
    times as long), and 8,192 elsewhere."""
    return asked if asked is not None else _TOKENS.get(device.type, _TOKENS_ELSEWHERE)


def batches(items: Iterable[_Item], batch_tokens: int, *, keep_pairs: bool = False) -> Iterator[list[_Item]]:
    """Items of about one length together, longest first (so that memory runs out at once or never), at most
    ``batch_tokens`` padded tokens or one item each. ``keep_pairs``: the items of a pair stay neighbours."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: give at least 1")
    items = [item for item in items if item.needed]
    longest: dict[str, int] = {}
    for item in items if keep_pairs else ():
        key = item.pair or item.name
        longest[key] = max(longest.get(key, 0), item.needed)
    batch: list[_Item] = []
    width = 0
    for item in sorted(
        items, key=lambda item: (-longest.get(item.pair or item.name, item.needed), item.pair or "", item.name)
    ):
        wider = max(width, item.needed)
        if batch and wider * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], item.needed
        batch.append(item)
        width = wider
    if batch:
        yield batch


def padded(batch: Sequence[MarkedSequence], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S], right-padded, each row cut after its last marked position."""
    return right_padded([item.token_ids[: item.needed] for item in batch], device)
