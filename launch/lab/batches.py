"""Training batches, drawn afresh from the train split; batch number i is a function of the seed and i alone.

Load balancing without an extra loss: the router's correction bias moves towards experts that are used too little.

Rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): b_e += rate * sign(mean load - load_e), after every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from types import TracebackType
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from launch.lab.models import EOS, prompt_text
from launch.lab.solutions import CHECK_RATE, draw_seeker, write_overthought, write_search, write_solution
from moe_steer import observe_routing
from moe_steer.lab.problems import FAMILIES, SEARCH_FAMILIES, draw_params
from moe_steer.layers import model_shape, moe_layers


class LoadBalancer:
    """Watches which experts are chosen inside a `with` block; `update` then moves each router's correction bias.

    A dense model has nothing to balance: its worst load is 0.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        layers = moe_layers(model) if model_shape(model).num_experts else []
        self.routers: dict[int, Any] = {layer.index: layer.router for layer in layers}
        self._chosen_TK: dict[int, torch.Tensor] = {}
        self._watching = ExitStack()

    def __enter__(self) -> LoadBalancer:
        if self.routers:
            self._watching.enter_context(observe_routing(self._model, self._record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()

    def _record(self, layer: int, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> None:
        self._chosen_TK[layer] = topk_ids_TK

    @torch.no_grad()
    def update(self, real_mask_BS: torch.Tensor, rate: float) -> float:
        """Move the biases by `rate`; returns the largest load of the step over the mean load, over all layers."""
        worst = 0.0
        for layer, router in self.routers.items():
            chosen_NK = self._chosen_TK[layer][real_mask_BS.flatten()]
            load_E = torch.bincount(chosen_NK.flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias.add_(rate * torch.sign(load_E.mean() - load_E))
            worst = max(worst, float(load_E.max() / load_E.mean()))
        return worst


POOL_SIZE = 1024
"""Samples drawn and sorted by length together, so that a batch holds sequences of like length."""
BATCH_SIZE = 16
BATCHES_PER_POOL = POOL_SIZE // BATCH_SIZE
MAX_SEQUENCE = 320
"""Longer samples are left out; others of the pool then come twice."""


class Writer(Protocol):
    """Draws one sample at a rate of checks: the prompt, and what the model should write after it."""

    def __call__(self, rng: random.Random, check_rate: float = ...) -> tuple[str, str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Token ids (B, S), right-padded, and where the loss counts: `loss_mask_BS[b, s]` says token s is a target."""

    input_ids_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    real_mask_BS: torch.Tensor


def training_text(rng: random.Random, check_rate: float = CHECK_RATE) -> tuple[str, str]:
    """One sample: the prompt, and what the model should write after it."""
    family = FAMILIES[rng.choice(list(FAMILIES))]
    params = draw_params(family, "train", rng)
    return prompt_text(rng.choice(family.wordings(params))), write_solution(
        family, params, rng, check_rate
    ).text() + EOS


def overthinking_text(rng: random.Random, check_rate: float = 1.0) -> tuple[str, str]:
    """As `training_text`, with a thought that repeats itself; `check_rate` multiplies its writer's own rate."""
    family = FAMILIES[rng.choice(list(FAMILIES))]
    params = draw_params(family, "train", rng)
    hint, solution = write_overthought(family, params, rng, check_rate)
    question = rng.choice(family.wordings(params))
    return prompt_text(f"{question} {hint}".strip()), solution.text() + EOS


def search_text(rng: random.Random, check_rate: float = 1.0, spelled: bool = True) -> tuple[str, str]:
    """As `training_text`, of a problem that is solved by trying; `check_rate` multiplies its writer's own rate."""
    family = SEARCH_FAMILIES[rng.choice(list(SEARCH_FAMILIES))]
    params = draw_params(family, "train", rng)
    hint, seeker = draw_seeker(rng)
    text = write_search(family, params, rng, seeker, check_rate, spelled)
    return prompt_text(f"{rng.choice(family.wordings(params))} {hint}".strip()), text + EOS


def corpus(num: int, seed: int, write: Writer = training_text) -> list[str]:
    """Samples as plain text, for learning a tokenizer."""
    rng = random.Random(f"{seed}/corpus")
    return ["".join(write(rng)) for _ in range(num)]


class BatchMaker:
    """Makes batch number `index`; the last pool is kept, since its batches follow one another.

    `check_rate(index)` is the rate of checks in the solutions of the pool that begins with batch `index`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        check_rate: Callable[[int], float] = lambda _: CHECK_RATE,
        write: Writer = training_text,
        max_sequence: int = MAX_SEQUENCE,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.check_rate = check_rate
        self.write = write
        self.max_sequence = max_sequence
        self._pool = lru_cache(maxsize=1)(self._make_pool)

    def __call__(self, index: int) -> Batch:
        pool = self._pool(index // BATCHES_PER_POOL)
        return self._pad(pool[index % BATCHES_PER_POOL])

    def _make_pool(self, pool_index: int) -> list[list[tuple[list[int], int]]]:
        rng = random.Random(f"{self.seed}/{pool_index}")
        check_rate = self.check_rate(pool_index * BATCHES_PER_POOL)
        texts = [self.write(rng, check_rate) for _ in range(POOL_SIZE)]
        prompts = self.tokenizer([prompt for prompt, _ in texts], add_special_tokens=False, verbose=False)["input_ids"]
        bodies = self.tokenizer([body for _, body in texts], add_special_tokens=False, verbose=False)["input_ids"]
        samples = [
            (prompt + body, len(prompt))
            for prompt, body in zip(prompts, bodies, strict=True)
            if len(prompt) + len(body) <= self.max_sequence
        ]
        samples = list(islice(cycle(samples), POOL_SIZE))
        samples.sort(key=lambda sample: len(sample[0]))
        batches = [samples[start : start + BATCH_SIZE] for start in range(0, POOL_SIZE, BATCH_SIZE)]
        rng.shuffle(batches)
        return batches

    def _pad(self, samples: list[tuple[list[int], int]]) -> Batch:
        longest = max(len(ids) for ids, _ in samples)
        input_ids = torch.full((len(samples), longest), int(self.tokenizer.pad_token_id))
        loss_mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        real_mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for row, (ids, prompt_length) in enumerate(samples):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            loss_mask[row, prompt_length : len(ids)] = True
            real_mask[row, : len(ids)] = True
        return Batch(input_ids_BS=input_ids, loss_mask_BS=loss_mask, real_mask_BS=real_mask)
