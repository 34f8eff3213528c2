"""Round by round: rows that wait take the places of those that have finished, and go back where memory runs out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from reasoning_evals.engines.batch import Batch, Decoder, Finished
from reasoning_evals.engines.sampling import Request


class Rounds:
    """The samples of ``requests``, decoded ``places`` at a time; equal prompts are best next to each other.

    When a quarter of the places is free, requests that wait take them. A cache whose rows cannot be joined to others is
    decoded to its end, and only prompts of one length share it: without padding.

    ``sets_aside``: where the GPU's memory runs out, rows go back to those that wait, to start again from their prompts with the
    same random numbers, and fewer are decoded at once from then on. (Not where other ranks take part in the forward: they would
    wait for it.)
    """

    def __init__(self, decoder: Decoder, requests: Sequence[Request], places: int, sets_aside: bool = False) -> None:
        self.places = places
        self._decoder = decoder
        self._waiting = list(requests)
        self._live: list[Batch] = []
        """The batch that is decoded and, before they have joined it, those whose prompts have just been processed."""
        self._sets_aside = sets_aside

    def __iter__(self) -> Iterator[Finished]:
        while self._waiting or self._live:
            try:
                yield from self._round()
                continue
            except torch.cuda.OutOfMemoryError as error:
                if not self._sets_aside or self.places == 1:
                    raise
                why = str(error).split(". ")[0]
            # Outside of the handler: while it runs, the error keeps the tensors of the failed forward alive.
            self._make_room(why)

    def _round(self) -> Iterator[Finished]:
        """Fill the free places if it is time to, then decode one token of each row."""
        free = self.places - sum(map(len, self._live))
        joins = self._decoder.joins
        if self._waiting and (not self._live or (joins and free >= min(len(self._waiting), max(1, self.places // 4)))):
            taken = self._waiting[:free]
            if not joins:
                taken = _by_length(taken)[0]
            for group in [taken] if self._decoder.takes_padding else _by_length(taken):
                batch = Batch(self._decoder, group)
                self._live.append(batch)
                del self._waiting[: len(group)]
                yield from batch.start()
            self._live = [batch for batch in self._live if batch]
        if len(self._live) > 1:
            self._live[0].join(self._live[1:])
            self._live = self._live[:1]
        if self._live:
            yield from self._live[0].step()
            self._live = [batch for batch in self._live if batch]

    def _make_room(self, why: str) -> None:
        """Half of the rows that memory did not suffice for wait again."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = sum(map(len, self._live))
        half = max(1, min(self.places, rows or self.places) // 2)
        back: list[Request] = []
        for batch in self._live:
            back += batch.set_aside(half)
        self._live = [batch for batch in self._live if batch]
        self._waiting[:0] = back
        self.places = max(half, sum(map(len, self._live)))
        print(
            f"GPU memory ran out with {rows} rows ({why}): from here on {self.places} are decoded at once", flush=True
        )


def _by_length(requests: list[Request]) -> list[list[Request]]:
    """Neighbours with prompts of one length together."""
    return [list(group) for _, group in itertools.groupby(requests, lambda request: len(request.prompt_ids))]
