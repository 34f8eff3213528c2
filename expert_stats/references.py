"""Reference tokens: what a marker is compared with where the question is whether an expert answers to the thought or to a token.

They are the most frequent tokens of the traces, and the first tokens of thoughts and answers, where the marker's neighbours stand.
R numbers them. Only their sums over all traces are kept: 40 of them by trace would be larger than all else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_steer.tokens import MarkerSet, Trace

Array = np.ndarray[Any, Any]

NUM_FREQUENT, NUM_FIRST = 40, 16


def reference_tokens(
    traces: Iterable[Trace], markers: MarkerSet, text_of: Callable[[int], str] | None = None
) -> Mapping[int, str]:
    """Token id -> text ("" without ``text_of``) of the references for these traces, by id.

    The 40 most frequent tokens of the responses, and the 16 most frequent of the first four of thoughts and of answers; tokens
    that belong to a marker are none. Ties go to the lower id, so that the order of the traces does not matter.
    """
    own = {token for marker in markers.markers for form in marker.forms for token in form}
    frequent: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for trace in traces:
        frequent.update(trace.token_ids[trace.prompt_length :])
        for start in (trace.thought_start, None if trace.thought_end is None else trace.thought_end + 1):
            if start is not None:
                first.update(trace.token_ids[start : start + 4])
    chosen: list[int] = []
    for found, number in ((frequent, NUM_FREQUENT), (first, NUM_FIRST)):
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        chosen += [token for token, _ in ranked if token not in own and token not in chosen][:number]
    return {token: text_of(token) if text_of else "" for token in sorted(chosen)}


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Counts at reference tokens over all traces of the sum: ``joint_RLE`` selections, ``seen_R`` occurrences, int64."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    joint_RLE: Array
    seen_R: Array

    @classmethod
    def none(cls, num_layers: int, num_experts: int) -> References:
        """Counts without references."""
        return cls((), (), np.zeros((0, num_layers, num_experts), np.int64), np.zeros(0, np.int64))

    def __add__(self, other: References) -> References:
        """Of tokens that both counted: a token that one of them did not count has no sum."""
        both = sorted({*self.tokens} & {*other.tokens})
        mine, theirs = ([side.tokens.index(token) for token in both] for side in (self, other))
        texts = tuple(max(self.texts[i], other.texts[j]) for i, j in zip(mine, theirs, strict=True))
        joint_RLE = self.joint_RLE[mine] + other.joint_RLE[theirs]
        return References(tuple(both), texts, joint_RLE, self.seen_R[mine] + other.seen_R[theirs])

    @property
    def stamp(self) -> str:
        """All of it, for a digest."""
        return repr((self.tokens, self.texts, self.seen_R.tolist())) + self.joint_RLE.astype("<i8").tobytes().hex()

    def check(self, top_k: int) -> None:
        """ValueError for sums that no counting gives."""
        wanted = self.seen_R[:, None] * top_k
        if (self.joint_RLE < 0).any() or (self.joint_RLE.sum(-1) != wanted).any():
            raise ValueError(
                "the counts break the law 'selections at a reference token per layer == occurrences x top-k': collect again"
            )
