"""What a sampler is asked and what it answers: any engine that turns prompts into completions can stand behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reasoning_evals.prompts import RenderedPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """The decoding rule of a run; the defaults are the protocol of the R1 model card."""

    temperature: float = 0.6
    """Divides the logits. Not used when greedy."""
    top_p: float = 0.95
    """Smallest set of tokens with at least this probability; 1 keeps all. Not used when greedy."""
    top_k: int = 0
    """Only the so many most likely tokens, before top_p; 0 keeps all. Not used when greedy."""
    max_new_tokens: int = 32768
    """Longest completion in tokens, thought and stop token included."""
    greedy: bool = False
    """Take the most likely token at each step."""
    batch_size: int = 64
    """Samples decoded together. Part of the config, because the last bits of the logits depend on it."""

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
    """One sample wanted."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Decides the sample's randomness alone, whatever else is in the batch."""
    key: Any
    """Handed back with the sample; never looked at."""
    prompt: str = ""
    """The same prompt as text, for engines that take text."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample made."""

    key: Any
    token_ids: tuple[int, ...]
    """Generated ids, the stop token included."""
    text: str
    """Special tokens kept, the stop token left out."""
    finish_reason: str
    """stop or length."""


class Sampler(Protocol):
    """An engine: in-process model, HTTP endpoint, script."""

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield one sample a request, each as soon as it is finished, in any order.

        The same requests in the same order with the same config give the same samples in the same order.
        """
        ...

    def render(self, question: str) -> RenderedPrompt:
        """The default prompt of a question for this engine."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that identify model and engine; a run folder is refused when they differ.

        ``tag_ids`` (the ids of ``<think>`` and of ``</think>``, two lists), when given, lets the grading pass count the
        tokens of thoughts.
        """
        ...


def model_identity(model: Any) -> dict[str, Any]:
    """What a sampler of a loaded model says of it in run.json."""
    config = model.config
    return {
        "model": config.name_or_path,
        "model_type": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
