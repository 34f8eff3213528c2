"""The in-process sampler: a decode loop on a transformers model that drops finished rows at once and fills their places."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from moe_steer.json_files import quoted
from reasoning_evals.engines.batch import Batch, Finished
from reasoning_evals.engines.decoder import Decoder
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, model_identity, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt


class InProcessSampler:
    """Samples from a decoder in this process.

    Decoding follows ``SamplingConfig`` alone: of the model's generation_config only the stop ids are used. Every forward
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
        self.on_tokens: Callable[[int], None] | None = None
        """Called after every step with the number of tokens that it made."""
        self._room: CacheRoom | None = None

    def hold(self, rows: int, sets_aside: bool, context: int = 0) -> None:
        """Decode at most ``rows`` at once (0: as many as asked for), and fewer when the GPU's memory runs out, if ``sets_aside``
        (``Rounds``). ``context``: memory holds so many rows of this many tokens, and more where answers turn out shorter
        (``CacheRoom``). What this machine holds is not part of what the engine is: ``describe`` does not have it."""
        self._most, self._sets_aside = 0 if context else rows, sets_aside
        self._room = CacheRoom(rows * context, context) if context else None

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
        rounds = Rounds(decoder, order, min(places, self._most or places), self._sets_aside, self._room, self.on_tokens)
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
    """The ids that end a completion: the generation config's, else the model config's; and the tokenizer's, as vLLM takes it too.
    Checkpoints that were tuned on another template often name its end in the tokenizer alone, and would go on to the token limit.
    ValueError where a configuration names no token of the model: no completion would end."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", sys.maxsize)
    named = (
        getattr(source, "eos_token_id", None) for source in (getattr(model, "generation_config", None), model.config)
    )
    ids = next((one for one in named if one is not None), ())
    found = set(ids) if isinstance(ids, list | tuple) else {ids}
    if not all(type(one) is int for one in found) or (found and not any(0 <= one < size for one in found)):
        raise ValueError(
            f"the model {getattr(model.config, '_name_or_path', '')!r} would end its answers by eos_token_id {quoted(ids)}, and "
            f"has the tokens 0 to {size - 1}: mend it in generation_config.json or config.json"
        )
    end = getattr(tokenizer, "eos_token_id", None)
    return tuple(sorted(found | ({end} if isinstance(end, int) and 0 <= end < size else set())))


class CacheRoom:
    """How many rows a cache has room for: it is a rectangle of rows and columns, of at most ``cells`` tokens.

    At first every row is expected to become ``longest`` tokens long. Once ``ENOUGH`` answers are finished, most rows are
    expected to be as long as nine of ten of those that are known, rows under way counted by what they have so far: early
    answers are the short ones.
    """

    ENOUGH = 8

    def __init__(self, cells: int, longest: int) -> None:
        self.lengths: list[int] = []
        """Tokens of the finished rows, prompts included."""
        self._cells, self._longest = cells, longest

    def rows_of(self, width: int) -> int:
        """The rows that may be so wide; one always may."""
        return max(1, self._cells // width)

    def expected_rows(self, widths: Sequence[int], next_prompt: int) -> int:
        """The rows that may be under way, where those of ``widths`` columns are and a prompt of ``next_prompt`` tokens waits. A
        wide row makes all others as wide: a quarter more than it has is left to it."""
        length = self._longest
        if len(self.lengths) >= self.ENOUGH:
            known = sorted([*self.lengths, *widths])
            length = min(length, known[(9 * len(known)) // 10])
        widest = max([next_prompt, *widths])
        return self.rows_of(max(1, length, min(self._longest, 5 * widest // 4)))


class Rounds:
    """The samples of ``requests``, decoded ``places`` at a time; equal prompts are best next to each other.

    When a quarter of the places is free, requests that wait take them. A cache whose rows cannot be joined to others is
    decoded to its end, and only prompts of one length share it: without padding.

    ``sets_aside``: where the GPU's memory runs out, rows go back to those that wait, to start again from their prompts with the
    same random numbers, and fewer are decoded at once from then on. (Not where other ranks take part in the forward: they would
    wait for it.)

    ``room``: what the cache may grow to. Fewer than ``places`` rows are then decoded while answers are expected to be long, and
    the youngest wait again where the rows outgrow it.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        places: int,
        sets_aside: bool = False,
        room: CacheRoom | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.places = places
        self._room = room
        self._on_tokens = on_tokens
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
        places = self._places_now()
        free = places - sum(map(len, self._live))
        joins = self._decoder.joins
        if self._waiting and (not self._live or (joins and free >= min(len(self._waiting), max(1, places // 4)))):
            taken = self._waiting[:free]
            if not joins:
                taken = _by_length(taken)[0]
            for group in [taken] if self._decoder.takes_padding else _by_length(taken):
                batch = Batch(self._decoder, group)
                self._live.append(batch)
                del self._waiting[: len(group)]
                yield from self._noted(batch.start())
            self._live = [batch for batch in self._live if batch]
        if len(self._live) > 1:
            self._live[0].join(self._live[1:])
            self._live = self._live[:1]
        if self._live and self._room:
            fitting = self._room.rows_of(self._live[0].width)
            if len(self._live[0]) > fitting:
                self._waiting[:0] = self._live[0].keep(fitting)
        if self._live:
            if self._on_tokens is not None:
                self._on_tokens(len(self._live[0]))
            yield from self._noted(self._live[0].step())
            self._live = [batch for batch in self._live if batch]

    def _places_now(self) -> int:
        """How many rows may be under way now."""
        if self._room is None:
            return self.places
        widths = [batch.width for batch in self._live for _ in range(len(batch))]
        next_prompt = len(self._waiting[0].prompt_ids) + 1 if self._waiting else 0
        return min(self.places, self._room.expected_rows(widths, next_prompt))

    def _noted(self, finished: Sequence[Finished]) -> Sequence[Finished]:
        """The same; their lengths are remembered."""
        if self._room is not None:
            self._room.lengths += [len(done.request.prompt_ids) + len(done.token_ids) for done in finished]
        return finished

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
