"""The in-process sampler: a decode loop on a transformers model that drops finished rows at once and fills their places."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from reasoning_evals.engines.batch import Batch, Decoder, Finished
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, model_identity, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt


class InProcessSampler:
    """Samples from a decoder in this process.

    Decoding follows ``SamplingConfig`` alone: only the stop ids of the model's generation_config are used. Every forward
    has a 2-D attention mask, and the cache is told when rows leave and join (``cache_rows``), so code that tracks the rows
    of a cache (a steering plan with a scope) stays correct.

    batch_size: rows decoded together; None uses the config's.
    processors: stateless LogitsProcessors of transformers, applied before temperature.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_size: int | None = None,
        processors: LogitsProcessorList | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: leave it out to take the config's")
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids(model, tokenizer)
        self._batch_size = batch_size
        self._processors = processors
        self._most, self._sets_aside = 0, True

    def hold(self, rows: int, sets_aside: bool) -> None:
        """Decode at most ``rows`` at once (0: as many as asked for), and fewer when the GPU's memory runs out, if ``sets_aside``
        (``Rounds``). What this machine holds is not part of what the engine is: ``describe`` does not have it."""
        self._most, self._sets_aside = rows, sets_aside

    def render(self, question: str) -> RenderedPrompt:
        """The question in the tokenizer's chat template."""
        return render_prompt(self.tokenizer, question)

    def describe(self) -> dict[str, Any]:
        """What identifies this engine in run.json."""
        return {
            "engine": "in_process",
            **model_identity(self.model),
            "batch_size": self._batch_size,
            "processors": [type(processor).__name__ for processor in self._processors or ()],
            "stop_ids": list(self.stop_ids),
            **thinking_notes(self.tokenizer),
        }

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield the samples as they finish; longest prompts first, equal prompts together."""
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"request {request.key!r} has no prompt ids: render its prompt first")
        order = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.prompt_ids))
        decoder = Decoder(self.model, config, self.stop_ids, self._processors)
        places = self._batch_size or config.batch_size
        rounds = Rounds(decoder, order, min(places, self._most or places), self._sets_aside)
        for done in rounds:
            if rounds.places < places:
                self._most = rounds.places
            yield self.finished(done.request, done.token_ids)

    def finished(self, request: Request, token_ids: tuple[int, ...]) -> Sample:
        """The finished sample of these generated ids."""
        stopped = token_ids[-1] in self.stop_ids
        shown = token_ids[:-1] if stopped else token_ids
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Sample(request.key, token_ids, text, "stop" if stopped else "length")


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion: the generation config's, else the model config's, else the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


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
