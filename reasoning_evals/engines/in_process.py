"""The in-process sampler: a decode loop on a transformers model that drops finished rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from reasoning_evals.engines.kv_cache import AbsorbedLatents, growing_cache
from reasoning_evals.engines.sampling import (
    Request,
    Sample,
    SamplingConfig,
    UniformStreams,
    draw,
    model_identity,
    take_most_likely,
    thinking_notes,
)
from reasoning_evals.prompts import RenderedPrompt, render_prompt


class InProcessSampler:
    """Samples from a decoder in this process.

    Decoding follows ``SamplingConfig`` alone: only the stop ids of the model's generation_config are used. Every forward
    has a 2-D attention mask, and rows leave the batch through ``cache.batch_select_indices``, so code that tracks the rows
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
        size = self._batch_size or config.batch_size
        for start in range(0, len(order), size):
            yield from _Batch(self, order[start : start + size], config, self._processors).decode()

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


class _Batch:
    """The rows that are decoded together. Row i of every tensor, of the cache and of ``requests`` is the same sample."""

    def __init__(
        self,
        sampler: InProcessSampler,
        requests: Sequence[Request],
        config: SamplingConfig,
        processors: LogitsProcessorList | None,
    ) -> None:
        self._sampler = sampler
        self._model = sampler.model
        self._config = config
        self._processors = processors
        self._requests = list(requests)
        device = self._model.device
        self._absorbed = AbsorbedLatents(self._model)
        self._stop_ids = torch.tensor(sampler.stop_ids, dtype=torch.long, device=device)
        self._streams = None if config.greedy else UniformStreams([r.seed for r in requests], device)
        self._width = max(len(request.prompt_ids) for request in requests)
        size = (len(requests), self._width + config.max_new_tokens)
        self._cache: Cache = growing_cache(self._model.config, joint=bool(self._absorbed.layers), most=size[1])
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

    def decode(self) -> Iterator[Sample]:
        """One forward a step until every row is finished."""
        with torch.inference_mode():
            logits_BV = self._prefill()
        for length in range(self._width, self._width + self._config.max_new_tokens):
            with torch.inference_mode():
                if length > self._width:
                    logits_BV = self._step(length)
                done = self._choose(logits_BV, length)
                samples = [
                    self._sampler.finished(
                        self._requests[row], tuple(self._tokens_BT[row, self._width : length + 1].tolist())
                    )
                    for row in done
                ]
                self._drop(done)
            yield from samples
            if not self._requests:
                return

    def _prefill(self) -> Tensor:
        """Process each distinct prompt once and copy its cache row to all samples of the prompt: k samples cost one prefill."""
        first_row: dict[tuple[int, ...], int] = {}
        source = [first_row.setdefault(request.prompt_ids, len(first_row)) for request in self._requests]
        rows = [source.index(number) for number in range(len(first_row))]
        mask_BT = self._mask_BT[rows, : self._width]
        output = self._model(
            input_ids=self._tokens_BT[rows, : self._width],
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if len(rows) == len(source):
            return output.logits[:, -1]
        index = torch.tensor(source, device=mask_BT.device)
        self._cache.batch_select_indices(index)
        return output.logits[index, -1]

    def _step(self, length: int) -> Tensor:
        """Process the newest token of each row: logits [B, V] of the token at ``length``."""
        self._position_B += 1
        context: AbstractContextManager[Any] = self._absorbed if self._absorbed.layers else nullcontext()
        with context:
            output = self._model(
                input_ids=self._tokens_BT[:, length - 1 : length],
                attention_mask=self._mask_BT[:, :length],
                position_ids=self._position_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[:, -1]

    def _choose(self, logits_BV: Tensor, length: int) -> list[int]:
        """Write the token at ``length`` of each row; return the rows that are finished with it."""
        if self._processors:
            process: Any = self._processors
            logits_BV = process(self._tokens_BT[:, :length], logits_BV.float())
        if self._streams is None:
            ids_B = take_most_likely(logits_BV)
        else:
            rule = self._config
            ids_B = draw(logits_BV, self._streams.next(), rule.temperature, rule.top_p, rule.top_k)
        self._tokens_BT[:, length] = ids_B
        if length + 1 == self._tokens_BT.shape[1]:
            return list(range(len(self._requests)))
        return torch.isin(ids_B, self._stop_ids).nonzero()[:, 0].tolist()

    def _drop(self, done: Sequence[int]) -> None:
        """Remove the finished rows; rows from the end fill the gaps.

        Why not simply keep ``tensor[rows_left]``: the token and mask tensors are large, and that would copy all rows at
        every finished sample. Here only as many rows are copied as have finished. The cache has no such operation and is
        gathered as a whole. Row order carries no meaning: each row has its own random stream, which moves with it. Example:
        6 rows, ``done`` = [1, 4]. 4 rows are left, so rows 4 and 5 must go; 4 has finished, 5 moves to place 1: ``keep`` =
        [0, 5, 2, 3].
        """
        left = len(self._requests) - len(done)
        if not done or not left:
            self._requests = self._requests if left else []
            return
        gone = set(done)
        keep = list(range(left))
        movers = iter([row for row in range(left, len(self._requests)) if row not in gone])
        for row in done:
            if row < left:
                keep[row] = next(movers)
        self._cache.batch_select_indices(torch.tensor(keep, device=self._tokens_BT.device))
        to = [row for row in range(left) if keep[row] != row]
        source = [keep[row] for row in to]
        for tensor in (self._tokens_BT, self._mask_BT, self._position_B):
            tensor[to] = tensor[source]
        self._tokens_BT, self._mask_BT = self._tokens_BT[:left], self._mask_BT[:left]
        self._position_B = self._position_B[:left]
        self._requests = [self._requests[row] for row in keep]
        if self._streams is not None:
            self._streams.select(keep)
