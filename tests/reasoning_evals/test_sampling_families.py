"""The in-process sampler on every decoder family: greedy tokens equal ``model.generate`` of each prompt alone, token for token.

Windows, chunks, pools and index budgets are narrow, so that the answers run far beyond them. Rows share prompts, have prompts
of unequal lengths, end at different steps, and those that wait take their places.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from families import available, batch
from narrow_families import narrow
from reasoning_evals.engines.batch import Decoder
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig

NEW_TOKENS = 20
ALONE = {"deepseek_v4", "minimax", "minimax_m3_vl_text", "unlimited_ocr"}
"""Families with a cache of their own: rows cannot be joined, and only prompts of one length share a batch."""


class Words:
    eos_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, ids))


@functools.cache
def prompts() -> list[tuple[int, ...]]:
    """Three of unequal lengths, one longer than the windows."""
    return [tuple(row[:length].tolist()) for row, length in zip(batch(3, 14), (14, 5, 9), strict=True)]


@functools.cache
def alone(name: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompt -> greedy tokens of ``model.generate``, without an end."""
    model, found = narrow(name), {}
    settings = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    model.generation_config.eos_token_id = None
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found[prompt] = tuple(out[0, len(prompt) :].tolist())
    return found


def check(name: str, size: int, order: Sequence[int]) -> None:
    """Requests for these prompts, by number, ``size`` rows at a time, against each prompt alone."""
    model, expected = narrow(name), alone(name)
    # Tokens that some answers hold early and others late or never, so that rows end at different steps.
    model.generation_config.eos_token_id = sorted({expected[prompts()[0]][6], expected[prompts()[1]][-4]})
    sampler = InProcessSampler(model, Words(), batch_size=size)
    requests = [Request(prompts()[number], 0, key) for key, number in enumerate(order)]
    made = {
        sample.key: sample.token_ids
        for sample in sampler.sample(requests, SamplingConfig(greedy=True, max_new_tokens=NEW_TOKENS))
    }
    for request in requests:
        tokens = expected[request.prompt_ids]
        ends = [place + 1 for place, token in enumerate(tokens) if token in sampler.stop_ids]
        assert made[request.key] == tokens[: ends[0] if ends else None]


@pytest.mark.parametrize("name", available())
def test_greedy_equals_generate_of_each_prompt_alone(name: str) -> None:
    check(name, 4, (1, 0, 1, 2, 0, 2, 1))
    decoder = Decoder(narrow(name), SamplingConfig(greedy=True), (), None)
    assert decoder.joins == (name not in ALONE)
