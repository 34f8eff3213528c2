"""The interface of samplers (settings, requests, samples), and drawing token ids from logits.

Each sample has its own stream of uniform random numbers, so its result does not depend on the other rows of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moe_steer.thinking import thinking_format, token_tags
from reasoning_evals.prompts import RenderedPrompt

_BLOCK = 128
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """The decoding rule of a run; the defaults are the protocol of the R1 model card."""

    temperature: float = 0.6
    """Divides the logits. Not used when greedy."""
    top_p: float = 0.95
    """Smallest set of tokens with at least this probability; 1 keeps all. Not used when greedy."""
    top_k: int = 0
    """Only this many of the most likely tokens, before top_p; 0 keeps all. Not used when greedy."""
    max_new_tokens: int = 32768
    """Longest completion in tokens, including thought and stop token."""
    greedy: bool = False
    """Take the most likely token at each step."""
    batch_size: int = 64
    """Samples decoded together. Part of the config because the last bits of the logits depend on the batch size."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature must be a positive number, got {self.temperature}: for the argmax use greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}: 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (keep all) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingConfig:
        """ValueError on an unknown key."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"unknown sampling settings {unknown}: known are {names}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to make."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Seed of the sample's random numbers, independent of the rest of the batch."""
    key: Any
    """Returned with the sample; not interpreted."""
    prompt: str = ""
    """The same prompt as text, for engines that take text."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished sample."""

    key: Any
    token_ids: tuple[int, ...]
    """Generated ids, including the stop token."""
    text: str
    """Text with special tokens, without the stop token."""
    finish_reason: str
    """stop, length or content_filter."""
    num_tokens: int | None = None
    """Generated tokens by the server's count, where there are no ids."""
    num_thinking: int | None = None
    """Of them those of the thought, by the server's count."""


class Sampler(Protocol):
    """Anything that turns prompts into completions: an in-process model, an HTTP endpoint, a script."""

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield one sample a request, each as soon as it is finished, in any order.

        The same requests in the same order with the same config give the same samples.
        """
        ...

    def render(self, question: str) -> RenderedPrompt:
        """The default prompt of a question for this engine."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that identify model and engine; a run folder is refused when they differ.

        ``thinking`` and ``thinking_tokens`` (``thinking_notes``), when given, let the grading pass split thought from answer
        as this model writes them, and count their tokens.
        """
        ...


@runtime_checkable
class RemoteSampler(Sampler, Protocol):
    """A sampler that asks a server, which makes many samples at once: ``sample`` may run in several threads."""

    places: int
    """Requests under way at once, of all arms together."""

    def give_up(self) -> None:
        """End what is under way, in whatever thread."""
        ...


def model_identity(model: Any) -> dict[str, Any]:
    """What identifies a loaded model in run.json."""
    config = model.config
    return {
        "model": config.name_or_path,
        "model_type": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def thinking_notes(tokenizer: Any) -> dict[str, Any]:
    """For run.json: how the model writes its thoughts, as text and as token ids."""
    fmt = thinking_format(tokenizer)
    tags = token_tags(tokenizer, fmt)
    return {"thinking": fmt.to_dict(), "thinking_tokens": tags._asdict() if tags else None}


class UniformStreams:
    """One stream of uniform numbers in [0, 1) per row: Philox keyed by the row's seed, 53 bits a number, the same everywhere."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._streams = [np.random.Philox(key=seed) for seed in seeds]
        self._device = device
        self._block_BN = torch.empty(len(seeds), 0, dtype=torch.float64, device=device)
        self._used = 0

    def next(self) -> Tensor:
        """The next number of each row: [B] float64."""
        if self._used == self._block_BN.shape[1]:
            self._block_BN = self._drawn(_BLOCK)
            self._used = 0
        self._used += 1
        return self._block_BN[:, self._used - 1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._streams = [self._streams[row] for row in rows]
        self._block_BN = self._block_BN[torch.as_tensor(rows, device=self._device)]

    def join(self, others: Sequence[UniformStreams]) -> None:
        """Append the rows of other streams; each row goes on where it was."""
        parts = [self, *others]
        ahead = max(part._block_BN.shape[1] - part._used for part in parts)
        self._block_BN = torch.cat([part._reaching(ahead) for part in parts])
        self._used = 0
        self._streams = [stream for part in parts for stream in part._streams]

    def _reaching(self, ahead: int) -> Tensor:
        """The next ``ahead`` numbers of each row: those that lie ready and as many more as that takes."""
        ready_BN = self._block_BN[:, self._used :]
        return torch.cat([ready_BN, self._drawn(ahead - ready_BN.shape[1])], dim=1)

    def _drawn(self, number: int) -> Tensor:
        raw = np.stack([stream.random_raw(number) for stream in self._streams])
        return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).to(self._device)


def take_most_likely(logits_BV: Tensor) -> Tensor:
    """Greedy ids [B]; the first of equal logits, as argmax."""
    ids_B = logits_BV.argmax(-1)
    _refuse_nan(logits_BV.gather(-1, ids_B[:, None]))
    return ids_B


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Ids [B] by inverse transform: the first token, in order of ids, where the cumulated probability exceeds the uniform
    number.

    In order of ids, not of probability: a change in the last bits of the logits then moves each border just as little,
    while sorting by probability could swap two tokens.
    """
    ids_BC, probabilities_BC = nucleus(logits_BV, temperature, top_p, top_k)
    cumulated_BC = probabilities_BC.double().cumsum(-1)
    # uniform <= 1 - 2^-53, so the product is below the total and a token of probability 0 is never drawn.
    target_B1 = (uniform_B * cumulated_BC[:, -1])[:, None]
    return ids_BC.gather(-1, torch.searchsorted(cumulated_BC, target_B1, right=True))[:, 0]


def nucleus(logits_BV: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The tokens that remain after temperature, top-k and top-p: candidate ids [B, C] in ascending order and their
    probabilities [B, C] (float32, not normalised, 0 for a candidate that is cut).

    The same sets as transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper, without sorting the
    vocabulary: only as many of the most likely tokens are examined as top-p needs. Among equal logits at the top-k border
    exactly k remain.
    """
    scores_BV = logits_BV.float() / temperature
    vocabulary = scores_BV.shape[-1]
    if top_k == 0 and top_p == 1:
        probabilities_BV = scores_BV.softmax(-1)
        _refuse_nan(probabilities_BV[:, 0])
        return torch.arange(vocabulary, device=scores_BV.device).expand_as(scores_BV), probabilities_BV
    if top_k:
        scores_BC, ids_BC = scores_BV.topk(min(top_k, vocabulary))
        probabilities_BC = scores_BC.softmax(-1)
        _refuse_nan(probabilities_BC[:, 0])
    else:
        total_B1 = scores_BV.logsumexp(-1, keepdim=True)
        _refuse_nan(total_B1)
        num_candidates = _CANDIDATES
        while True:
            scores_BC, ids_BC = scores_BV.topk(min(num_candidates, vocabulary))
            probabilities_BC = (scores_BC - total_B1).exp()
            if num_candidates >= vocabulary or bool((probabilities_BC.sum(-1) > top_p + 1e-6).all()):
                break
            num_candidates *= 8
    more_likely_BC = probabilities_BC.cumsum(-1) - probabilities_BC
    probabilities_BC = probabilities_BC.masked_fill(more_likely_BC >= top_p, 0.0)
    ids_BC, order_BC = ids_BC.sort(-1)
    return ids_BC, probabilities_BC.gather(-1, order_BC)


def _refuse_nan(values: Tensor) -> None:
    if bool(values.isnan().any()):
        raise ValueError(
            "the model returned logits that are not numbers: with a steering plan lower its gains, else load the model in bfloat16 or float32"
        )
