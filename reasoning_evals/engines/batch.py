"""The decode loop: rows that are decoded together, dropped as they finish, and joined by others (``in_process.Rounds``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasoning_evals.engines.cache_rows import (
    drop_columns,
    drop_newest,
    join_rows,
    name_rows,
    select_rows,
)
from reasoning_evals.engines.decoder import Decoder, Dictation, Step
from reasoning_evals.engines.sampling import Request, UniformStreams, draw, take_most_likely

_ENOUGH_PADDING = 16
"""Columns of padding in every row that are worth dropping."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The generated ids of a request, with the stop token."""

    request: Request
    token_ids: tuple[int, ...]


class Batch:
    """The rows that are decoded together. Row i of every tensor, of the cache and of ``requests`` is the same sample.

    ``width`` columns are known; the cache has all but the newest. A row is padding, prompt, generated tokens, and ends with
    the newest column.
    """

    def __init__(self, decoder: Decoder, requests: Sequence[Request]) -> None:
        self._decoder = decoder
        self._requests = list(requests)
        device = decoder.model.device
        greedy = decoder.config.greedy
        self._streams = None if greedy else UniformStreams([request.seed for request in requests], device)
        self._width = max(len(request.prompt_ids) for request in requests)
        self._starts = [self._width] * len(requests)
        """The column of each row's first generated token."""
        self._dictation = Dictation(len(requests))
        self._doing = ""
        """What has begun and not ended: start, step, choice or join; "" where cache and tensors agree."""
        size = (len(requests), self._width + decoder.config.max_new_tokens)
        self._cache = decoder.new_cache(size[1])
        self._tokens_BT = torch.zeros(size, dtype=torch.long)
        self._mask_BT = torch.ones(size, dtype=torch.long)
        for row, request in enumerate(requests):
            padding = self._width - len(request.prompt_ids)
            self._tokens_BT[row, padding : self._width] = torch.tensor(request.prompt_ids)
            self._mask_BT[row, :padding] = 0
        self._tokens_BT = self._tokens_BT.to(device)
        self._mask_BT = self._mask_BT.to(device)
        # Position of the newest token of each row, without padding.
        self._position_B = self._mask_BT[:, : self._width].sum(-1) - 1

    def __len__(self) -> int:
        return len(self._requests)

    @torch.inference_mode()
    def start(self) -> list[Finished]:
        """Process the prompts and choose the first tokens: the rows that are finished with theirs, which leave."""
        self._doing = "start"
        finished = self._choose(self._prefill())
        self._doing = ""
        return finished

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Process the newest token of each row and choose the next: the rows that are finished with theirs, which leave."""
        self._doing = "step"
        self._position_B += 1
        newest = slice(self._width - 1, self._width)
        logits_BV = self._decoder.decode(
            self._tokens_BT[:, newest], self._mask_BT[:, : self._width], self._position_B[:, None], self._cache
        )
        self._doing = "choice"  # which cannot be undone: it draws from the rows' streams
        finished = self._choose(logits_BV)
        self._doing = ""
        return finished

    @torch.inference_mode()
    def join(self, others: Sequence[Batch]) -> None:
        """Append the rows of other batches; all keep their newest token in the newest column."""
        self._doing = "join"
        parts = [self, *others]
        for part in parts:
            part._drop_padding(1)
        width = max(part._width for part in parts)
        room = width + self._decoder.config.max_new_tokens
        join_rows(self._cache, [part._cache for part in others], width - 1, room)
        tokens_BT = self._tokens_BT.new_zeros(sum(map(len, parts)), room)
        mask_BT = torch.ones_like(tokens_BT)
        row = 0
        for part in parts:
            mine, padding = slice(row, row + len(part)), width - part._width
            tokens_BT[mine, padding:width] = part._tokens_BT[:, : part._width]
            mask_BT[mine, :padding] = 0
            mask_BT[mine, padding:width] = part._mask_BT[:, : part._width]
            row += len(part)
        self._position_B = torch.cat([part._position_B for part in parts])
        self._starts = [start + width - part._width for part in parts for start in part._starts]
        self._requests = [request for part in parts for request in part._requests]
        self._dictation.join([part._dictation for part in others])
        self._tokens_BT, self._mask_BT, self._width = tokens_BT, mask_BT, width
        if self._streams is not None:
            self._streams.join([part._streams for part in others if part._streams is not None])
        self._doing = ""

    @property
    def width(self) -> int:
        """Columns that every row takes in the cache, once its newest token is processed."""
        return self._width

    @torch.inference_mode()
    def keep(self, number: int) -> list[Request]:
        """Between two steps: requests that leave, unfinished, the youngest first, so that ``number`` rows are left."""
        leaving = self._youngest(number)
        back = [self._requests[row] for row in sorted(leaving)]
        self._drop(leaving)
        return back

    def _youngest(self, number: int) -> set[int]:
        """The rows beyond the ``number`` that have most tokens."""
        return set(sorted(range(len(self._requests)), key=lambda row: self._starts[row])[number:])

    @torch.inference_mode()
    def set_aside(self, number: int) -> list[Request]:
        """After an error, which came out of this batch or another: requests that leave, unfinished. All of them if what was
        begun cannot be undone; if a step can, those with the fewest tokens, so that at most ``number`` rows are left."""
        if not self._doing:
            return []
        back = self._requests
        if self._doing == "step" and len(back) > number and self._undo_step():
            leaving = self._youngest(number)
            try:
                self._drop(leaving)
                self._doing = ""
                return [back[row] for row in sorted(leaving)]
            except torch.cuda.OutOfMemoryError:
                pass
        self._requests, self._cache = [], None
        return back

    def _undo_step(self) -> bool:
        """Whether the newest column was taken out of the layers of the cache that have it already."""
        if self._cache is None or not drop_newest(self._cache, self._width - 1):
            return False
        self._position_B -= 1
        return True

    def _prefill(self) -> Tensor:
        """Process each distinct prompt once and copy its cache row to all samples of the prompt: k samples cost one prefill."""
        first_row: dict[tuple[int, ...], int] = {}
        source = [first_row.setdefault(request.prompt_ids, len(first_row)) for request in self._requests]
        rows = [source.index(number) for number in range(len(first_row))]
        mask_BT = self._mask_BT[rows, : self._width]
        output = self._decoder.model(
            input_ids=self._tokens_BT[rows, : self._width],
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self._decoder.cache_name: self._cache},
        )
        if self._cache is None:
            self._cache = getattr(output, self._decoder.cache_name)
        if self._cache is None:
            raise ValueError(
                f"{type(self._decoder.model).__name__} hands back no key-value cache: serve the model and use --endpoint"
            )
        logits_BV: Tensor = output.logits[:, -1]
        if len(rows) < len(source):
            index = torch.tensor(source, device=mask_BT.device)
            select_rows(self._cache, index, len(rows))
            logits_BV = logits_BV[index]
        name_rows(self._cache, [request.key for request in self._requests])
        return logits_BV

    def _choose(self, logits_BV: Tensor) -> list[Finished]:
        """Write the next token of each row; the rows that are finished with it leave."""
        rule, width = self._decoder.config, self._width
        if self._decoder.processors is not None:
            logits_BV = self._decoder.processors(self._tokens_BT[:, :width], logits_BV.float())
        if self._streams is None:
            ids_B = take_most_likely(logits_BV)
        else:
            ids_B = draw(logits_BV, self._streams.next(), rule.temperature, rule.top_p, rule.top_k)
        for redirect in self._decoder.redirects:
            ids_B = redirect(self._tokens_BT[:, :width], ids_B)
        if self._decoder.interjects:
            ids_B = self._dictation.write(self._decoder.interjects, self._now(ids_B))
        self._tokens_BT[:, width] = ids_B
        self._width += 1
        done = set(torch.isin(ids_B, self._decoder.stop_ids).nonzero()[:, 0].tolist())
        done.update(row for row, start in enumerate(self._starts) if self._width - start == rule.max_new_tokens)
        finished = [
            Finished(self._requests[row], tuple(self._tokens_BT[row, self._starts[row] : self._width].tolist()))
            for row in sorted(done)
        ]
        self._drop(done)
        return finished

    def _now(self, drawn_B: Tensor) -> Step:
        known = slice(self._width)
        free_B = torch.tensor(self._dictation.free, device=drawn_B.device)
        generated_B = self._width - torch.tensor(self._starts, device=drawn_B.device)
        tensors = (self._tokens_BT[:, known], self._mask_BT[:, known], self._position_B, drawn_B, free_B, generated_B)
        return Step(*tensors, cache=self._cache, decode=self._decoder.decode)

    def _drop(self, done: set[int]) -> None:
        """Remove the finished rows; rows from the end fill the gaps.

        Only as many rows of the large tensors are copied as have finished. Row order carries no meaning: each row has its own
        random stream, which moves with it. Example: 6 rows, ``done`` = {1, 4}. 4 rows are left, so rows 4 and 5 must go; 4 has
        finished, 5 moves to place 1: ``keep`` = [0, 5, 2, 3].
        """
        num_rows = len(self._requests)
        left = num_rows - len(done)
        if not done or not left:
            self._requests = self._requests if left else []
            return
        keep = list(range(left))
        movers = iter([row for row in range(left, num_rows) if row not in done])
        for row in sorted(done):
            if row < left:
                keep[row] = next(movers)
        select_rows(self._cache, torch.tensor(keep, device=self._tokens_BT.device), num_rows)
        to = [row for row in range(left) if keep[row] != row]
        source = [keep[row] for row in to]
        for tensor in (self._tokens_BT, self._mask_BT, self._position_B):
            tensor[to] = tensor[source]
        self._tokens_BT, self._mask_BT = self._tokens_BT[:left], self._mask_BT[:left]
        self._position_B = self._position_B[:left]
        self._requests = [self._requests[row] for row in keep]
        self._starts = [self._starts[row] for row in keep]
        self._dictation.select(keep)
        if self._streams is not None:
            self._streams.select(keep)
        self._drop_padding(_ENOUGH_PADDING)

    def _drop_padding(self, enough: int) -> None:
        """Drop the columns that are padding in every row, if there are ``enough``: a row that has left keeps no other wide."""
        padding = min(
            start - len(request.prompt_ids) for start, request in zip(self._starts, self._requests, strict=True)
        )
        if padding >= enough and self._decoder.joins:
            drop_columns(self._cache, padding)
            self._tokens_BT, self._mask_BT = self._tokens_BT[:, padding:], self._mask_BT[:, padding:]
            self._width -= padding
            self._starts = [start - padding for start in self._starts]
