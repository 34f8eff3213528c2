"""Scopes on every kind of cache: what the sampler's rows do under a plan, against an uncached forward of each row alone.

Rows are sampled with refilling: they have prompts of unequal lengths, leave at different steps, and others take their places. A
logits processor writes each row's text, token by token, and keeps the logits. The second opinion reads the definitions of the
scopes literally and adds the vectors at those places in one forward of the whole text, without padding and without a cache.
"""

from __future__ import annotations

import copy
import functools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import tiny
from moe_steer import ResidualVector, SteeringPlan, steer
from moe_steer.layers import decoder_layers
from naive_scopes import in_scope
from narrow_families import narrow
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig

T, E, STOP = tiny.THINK, tiny.END_THINK, tiny.STOP
KINDS = {
    "full": "qwen3_moe",
    "sliding": "gpt_oss",
    "chunked": "llama4",
    "latent": "deepseek_v3",
    "latent, indexed": "deepseek_v32",
    "linear attention, DeltaNet": "qwen3_next",
    "linear attention, KDA": "kimi_linear",
    "linear attention, lightning": "bailing_hybrid",
    "linear attention, a cache class of its own": "minimax",
    "state space, mamba": "jamba",
    "state space, mamba 2": "granitemoehybrid",
    "state space, layers without a cache": "nemotron_h",
    "short convolution": "lfm2_moe",
    "convolution beside attention": "inkling",
    "compressed": "deepseek_v4",
    "block-sparse": "minimax_m3_vl_text",
    "streams side by side": "qwen4_exp",
    "embeddings of a composite model: latent, pooled index": "glm5_next",
    "embeddings of a composite model: latent, indexed": "mistral_large4",
    "embeddings of a composite model: sliding": "step3p7",
    "embeddings of a composite model: full": "qwen3_vl_moe",
}
"""Missing: the reference sliding window of unlimited_ocr, which without a cache is full attention."""
SCOPES = ("thought", "answer", "step_end", "after:3")
TEXTS = (
    ([5, 6], [T, 7, 10, 8, 30, 40, 9, 50, 40, E, 10, 40]),
    ([3, 10, 8, 12, 13, 14, 15, 16, 17, T, 30, 40], [40, 7, 30, 20, E, 11, 30]),
    ([4, T, 20, 9, E], [10, 50, 40, T, 50, 40, 10, 30, 11, 40, 20, 12, 13, E, 14, 10]),
    ([8, 7, T], [10, 30, 11, E, 12]),
    ([11, 9, 8, 7, T], [21, 22, 10, 23, 24, 25, 50, 26, 27, 20, E, 28, 29, 31]),
    ([9, 20, T], [10, 31]),
)
"""Prompt and continuation of each row: thoughts opened in the prompt and later, closed early, late and opened again."""


class Dictate(LogitsProcessor):
    """Each row goes on as its text says; keeps the logits [V] at every place of every text."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.rows: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(len(scores))
        forced = torch.full_like(scores, -torch.inf)
        for row, padded in enumerate(input_ids.tolist()):
            ids = padded[next(place for place, token in enumerate(padded) if token) :]
            number = next(n for n, (prompt, rest) in enumerate(TEXTS) if (prompt + rest)[: len(ids)] == ids)
            self.logits[number, len(ids) - 1] = scores[row].double()
            forced[row, [*TEXTS[number][0], *TEXTS[number][1], STOP][len(ids)]] = 0.0
        return forced


@functools.cache
def model_of(name: str) -> Any:
    model = copy.deepcopy(narrow(name, vocab_size=tiny.VOCAB))
    model.generation_config.eos_token_id = STOP
    return model


def naive(model: Any, vectors: dict[str, tuple[int, Tensor]]) -> tuple[list[Tensor], dict[int, int]]:
    """Logits [tokens, V] of each text, and entry -> tokens that it acted on."""
    layers, found, counts = decoder_layers(model)[1], [], dict.fromkeys(range(len(vectors)), 0)
    for prompt, rest in TEXTS:
        ids = prompt + rest
        with ExitStack() as stack:
            for number, (scope, (layer, vector_D)) in enumerate(vectors.items()):
                places = [p for p in range(len(ids)) if in_scope(scope, ids[: p + 1], len(prompt))]
                counts[number] += len(places)
                stack.callback(layers[layer].register_forward_hook(add(vector_D, places)).remove)
            with torch.no_grad():
                found.append(model(torch.tensor([ids]), use_cache=False).logits[0].double())
    return found, counts


def add(vector_D: Tensor, places: list[int]) -> Any:
    def hook(_: Any, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, places] += vector_D.to(hidden.dtype).repeat(hidden.shape[-1] // len(vector_D))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_scopes_act_on_exactly_the_tokens_that_they_name(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    entries, vectors = [], {}
    for number, scope in enumerate(SCOPES):
        layer = number % 2
        vector_D = torch.randn(
            model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(number)
        )
        header = {"layer": layer, "site": "residual"}
        save_file({"vector": vector_D}, tmp_path / f"{number}.safetensors", metadata={"direction": json.dumps(header)})
        entries.append(ResidualVector(layer, f"{number}.safetensors", 2.0, scope))
        vectors[scope] = (layer, 2.0 * vector_D)
    dictate = Dictate()
    sampler = InProcessSampler(model, tiny.TinyTokenizer(), batch_size=3, processors=LogitsProcessorList([dictate]))
    requests = [Request(tuple(prompt), 0, number) for number, (prompt, _) in enumerate(TEXTS)]
    with steer(
        model, SteeringPlan(residual=entries, base_dir=str(tmp_path)), tokenizer=tiny.TinyTokenizer(), quiet=True
    ) as audit:
        made = {sample.key: list(sample.token_ids) for sample in sampler.sample(requests, SamplingConfig(greedy=True))}
    assert made == {number: [*rest, STOP] for number, (_, rest) in enumerate(TEXTS)}
    expected, counts = naive(model, vectors)
    bare, _ = naive(model, {})
    for (number, place), logits_V in dictate.logits.items():
        torch.testing.assert_close(logits_V, expected[number][place], atol=2e-3, rtol=1e-3)
    assert min((e - b).abs().max() for e, b in zip(expected, bare, strict=True)) > 0.1, "vectors that move nothing"
    assert dict(audit.residual) == counts
