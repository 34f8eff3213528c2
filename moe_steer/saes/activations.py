"""A model's activations as shuffled batches, which can restart at any batch without computing the earlier ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_steer.backends import layout_of
from moe_steer.layers import decoder, model_shape, token_limits, unwrap
from moe_steer.observe import observe_residual
from moe_steer.tokens import right_padded


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationBatches:
    """The residual stream after ``layer``, in batches [batch_size, D] of tokens from all sequences; call it with the number
    of batches to skip. Endless: each pass over the sequences has its own order.

    Sequences are run ``buffer_tokens`` at a time, in an order that the seed decides; the tokens of such a round are mixed,
    and what does not fill a batch is dropped. How many batches a round gives follows from the lengths alone, so leaving
    out rounds costs nothing. Sequences that all fit into one round are run only once.
    """

    model: Any
    sequences: Sequence[Sequence[int]]
    layer: int
    batch_size: int = 2048
    buffer_tokens: int = 1 << 19
    skip_first: int = 1
    """Number of positions skipped at the start of each sequence: the first token's activations have a very different size."""
    tokens_per_forward: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.buffer_tokens, self.tokens_per_forward) < 1 or self.skip_first < 0:
            raise ValueError(
                f"batch_size {self.batch_size}, buffer_tokens {self.buffer_tokens}, tokens_per_forward {self.tokens_per_forward}, skip_first {self.skip_first}: give at least 1, and 0 for the last"
            )
        check_sequences(self.model, self.sequences)
        if self._num_tokens < self.batch_size:
            raise ValueError(
                f"the sequences hold {self._num_tokens} tokens after the first {self.skip_first} of each: a batch of {self.batch_size} needs more"
            )

    def __call__(self, done: int) -> Iterator[Tensor]:
        """Batches from number ``done`` on, float32, on the model's device."""
        kept: Tensor | None = None
        for number, chosen in self._rounds():
            num_batches = sum(map(self._length, chosen)) // self.batch_size
            if done >= num_batches:
                done -= num_batches
                continue
            if kept is None or not self._fits_one_round:
                kept = torch.cat(list(residual_of(self.model, self._pick(chosen), self.layer, **self._how())))
            order_T = torch.randperm(len(kept), generator=self._generator(2 * number + 1)).to(kept.device)
            for batch in range(done, num_batches):
                yield kept[order_T[batch * self.batch_size : (batch + 1) * self.batch_size]].float()
            done = 0

    def digest(self) -> str:
        """Digest of everything that determines the batches, except the model."""
        settings = [
            self.layer,
            self.batch_size,
            self.buffer_tokens,
            self.skip_first,
            self.tokens_per_forward,
            self.seed,
        ]
        content = json.dumps([settings, [list(item) for item in self.sequences]]).encode()
        return hashlib.sha256(content).hexdigest()

    @property
    def _num_tokens(self) -> int:
        return sum(self._length(index) for index in range(len(self.sequences)))

    @property
    def _fits_one_round(self) -> bool:
        return self._num_tokens <= self.buffer_tokens

    def _length(self, index: int) -> int:
        return max(0, len(self.sequences[index]) - self.skip_first)

    def _rounds(self) -> Iterator[tuple[int, list[int]]]:
        """(number of the round, its sequences); a single round if everything fits into one."""
        if self._fits_one_round:
            number = 0
            while True:
                yield number, list(range(len(self.sequences)))
                number += 1
        number, epoch, chosen, held = 0, 0, [], 0
        while True:
            for index in torch.randperm(len(self.sequences), generator=self._generator(2 * epoch)).tolist():
                chosen.append(index)
                held += self._length(index)
                if held >= max(self.buffer_tokens, self.batch_size):
                    yield number, chosen
                    number, chosen, held = number + 1, [], 0
            epoch += 1

    def _pick(self, chosen: Sequence[int]) -> list[Sequence[int]]:
        return [self.sequences[index] for index in chosen]

    def _how(self) -> dict[str, int]:
        return {"skip_first": self.skip_first, "tokens_per_forward": self.tokens_per_forward}

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + purpose)


def residual_of(
    model: Any, sequences: Sequence[Sequence[int]], layer: int, *, skip_first: int = 1, tokens_per_forward: int = 8192
) -> Iterator[Tensor]:
    """The residual stream [T, D] after ``layer`` at all but the first positions of each sequence, forward by forward.

    Sequences of similar length run together, longest first, right-padded; no layer above runs.
    """
    inner, body = unwrap(model), decoder(model)
    device = inner.get_input_embeddings().weight.device
    stop = not layout_of(model).lockstep  # ranks in lockstep expect whole forwards of each other
    for batch in _by_length(sequences, tokens_per_forward):
        tokens = right_padded(batch, device)
        real_BS = tokens["attention_mask"].bool()
        real_BS[:, :skip_first] = False
        found: list[Tensor] = []

        def sink(_: int, hidden_BSD: Tensor, real_BS: Tensor = real_BS, found: list[Tensor] = found) -> None:
            found.append(hidden_BSD[real_BS.to(hidden_BSD.device)])

        with torch.no_grad(), observe_residual(model, [layer], sink, stop=stop):
            body(**tokens, use_cache=False)
        yield found[0]


def check_sequences(model: Any, sequences: Sequence[Sequence[int]]) -> None:
    """ValueError for no sequences, an empty one, and tokens or lengths beyond the model's vocabulary or context."""
    vocabulary, limit = token_limits(model)
    name = model_shape(model).model_type
    if not sequences:
        raise ValueError("there are no sequences to run: give texts or traces")
    for number, item in enumerate(sequences):
        if not item or max(item) >= vocabulary or min(item) < 0:
            raise ValueError(
                f"sequence {number} is empty or holds ids outside 0-{vocabulary - 1} of {name}: it was made with another tokenizer"
            )
        if limit is not None and len(item) > limit:
            raise ValueError(
                f"sequence {number} has {len(item)} tokens, the context of {name} {limit}: cut it or leave it out"
            )


def _by_length(sequences: Sequence[Sequence[int]], tokens_per_forward: int) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for item in sorted(sequences, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > tokens_per_forward:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
