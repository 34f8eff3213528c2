"""Steering, batched, left-padded and cached, against a decode of one row, one token at a time (``naive_scopes``)."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, observe_routing, steer
from moe_steer.tokens.cache_rows import FollowsRows
from naive_scopes import SCOPES, NaiveRow
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig

T, E = tiny.THINK, tiny.END_THINK
ROWS = (
    ([5, 6], [T, 7, 10, 8, 30, 40, 9, 50, 40, E, 10, 40]),
    ([3, 10, 8, T, 30, 40], [40, 7, 30, 20, 40, 40, E, 11, 30, 40, 12, 50]),
    ([4, T, 20, 9, E], [10, 50, 40, T, 50, 40, 10, 30, 11, 40, 20, 12]),
)
"""Prompt and continuation of each row: thoughts opened in the prompt and later, closed early, late and opened again."""
RESIDUAL_NORM = 3.0
ALLOWED = (5, 6, 10, 30, 40, 50, T, E)


@functools.cache
def model_of(kind: str) -> Any:
    """float64, so that only a wrong token in scope makes a difference that is seen."""
    model = copy.deepcopy(getattr(tiny, kind)()).double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    return model


@functools.cache
def busiest(kind: str) -> dict[int, int]:
    """Layer -> the expert that most tokens of the rows select."""
    found: dict[int, Tensor] = {}
    ids = torch.tensor([[token for prompt, rest in ROWS for token in (*prompt, *rest)]])
    with observe_routing(model_of(kind), lambda layer, ids_TK, _: found.update({layer: ids_TK})):
        model_of(kind)(ids)
    return {layer: int(ids_TK.flatten().mode().values) for layer, ids_TK in found.items()}


def case(
    kind: str, folder: Path, residual: Sequence[tuple[int, float, str]], scope: str | None
) -> tuple[SteeringPlan, dict[str, Any]]:
    """A plan with a vector for each (layer, strength, scope), units in turn, and with gains in ``scope``; and the same for the oracle."""
    width, entries, shifts = model_of(kind).config.hidden_size, [], []
    for number, (layer, strength, where) in enumerate(residual):
        vector_D = torch.randn(width, generator=torch.Generator().manual_seed(number))
        file, unit = f"v{number}.safetensors", ("vector", "residual_norm")[number % 2]
        header = {"layer": layer, "site": "residual", "residual_norm": RESIDUAL_NORM}
        save_file({"vector": vector_D}, folder / file, metadata={"direction": json.dumps(header)})
        entries.append(ResidualVector(layer, file, strength, where, unit))
        shift_D = vector_D.double() * strength
        if unit == "residual_norm":
            shift_D = shift_D * RESIDUAL_NORM / vector_D.double().pow(2).sum().sqrt()
        shifts.append((layer, shift_D, where))
    gains = dict.fromkeys(busiest(kind).items(), 12.0) if scope is not None else {}
    plan = SteeringPlan(
        experts=[ExpertGain(*key, gain) for key, gain in gains.items()],
        residual=entries,
        scope=scope or "all",
        base_dir=str(folder),
    )
    return plan, {"shifts": shifts, "gains": gains, "scope": scope or "all"}


def steered_logits(model: Any, plan: SteeringPlan) -> tuple[list[Tensor], dict[Any, int]]:
    """Logits [tokens, V] of each row: left-padded prompts in one forward, then the continuations one token at a time."""
    width = max(len(prompt) for prompt, _ in ROWS)
    padding = [width - len(prompt) for prompt, _ in ROWS]
    ids = torch.tensor([[30] * gap + prompt + rest for gap, (prompt, rest) in zip(padding, ROWS, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (len(row) - gap) for gap, row in zip(padding, ids, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, cache = [], None
    with steer(model, plan, tokenizer=tiny.TinyTokenizer(), quiet=True) as audit:
        for start, stop in [(0, width), *[(i, i + 1) for i in range(width, ids.shape[1])]]:
            out = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            found.append(out.logits)
    logits = torch.cat(found, 1)
    counts = {**audit.residual, **{key: fired.tokens for key, fired in audit.fired.items()}}
    return [row[gap:] for gap, row in zip(padding, logits, strict=True)], counts


def naive_logits(model: Any, oracle: Mapping[str, Any]) -> tuple[list[Tensor], dict[Any, int]]:
    """The same by the oracle."""
    found, counts = [], {}
    for prompt, rest in ROWS:
        row = NaiveRow(model, len(prompt), **oracle)
        found.append(torch.stack([row.feed(token) for token in (*prompt, *rest)]))
        for key, number in row.fired.items():
            counts[key] = counts.get(key, 0) + number
    return found, counts


@functools.cache
def plain_logits(kind: str) -> list[Tensor]:
    return naive_logits(model_of(kind), {})[0]


def assert_equal_to_naive(kind: str, plan: SteeringPlan, oracle: Mapping[str, Any]) -> None:
    model = model_of(kind)
    steered, counts = steered_logits(model, plan)
    expected, naive_counts = naive_logits(model, oracle)
    for one, other, bare in zip(steered, expected, plain_logits(kind), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(one, bare, atol=1e-2), "a plan that moves nothing would prove nothing"
    assert {key: number for key, number in counts.items() if number} == naive_counts
    assert tiny.hook_count(model) == 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_every_scope_equals_a_decode_token_by_token(kind: str, scope: str, tmp_path: Path) -> None:
    plan, oracle = case(kind, tmp_path, [(0, 1.0, scope), (1, -0.5, scope)], scope if kind == "deepseek_v3" else None)
    assert_equal_to_naive(kind, plan, oracle)


@pytest.mark.parametrize("scope", ["after:3", "step_end:paragraph"])
def test_expert_gains_alone_follow_a_scope(scope: str, tmp_path: Path) -> None:
    plan, oracle = case("deepseek_v3", tmp_path, [], scope)
    assert_equal_to_naive("deepseek_v3", plan, oracle)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_all_scopes_and_both_units_at_once(kind: str, tmp_path: Path) -> None:
    residual = [(number % 3, 0.3, scope) for number, scope in enumerate(SCOPES)]
    plan, oracle = case(kind, tmp_path, residual, "step_end:paragraph" if kind == "deepseek_v3" else None)
    assert_equal_to_naive(kind, plan, oracle)


def test_the_comparison_notices_one_wrong_token(tmp_path: Path) -> None:
    plan, oracle = case("qwen2", tmp_path, [(0, 1.0, "after:3")], None)
    wrong = {**oracle, "shifts": [(layer, shift_D, "after:4") for layer, shift_D, _ in oracle["shifts"]]}
    with pytest.raises(AssertionError):
        assert_equal_to_naive("qwen2", plan, wrong)


class Allow(LogitsProcessor):
    """Leaves a few tokens, so that a random model writes thoughts with steps."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + allowed(scores.shape[-1]).to(scores)


def allowed(vocab: int) -> Tensor:
    bias_V = torch.full((vocab,), -torch.inf)
    bias_V[list(ALLOWED)] = 0.0
    return bias_V


def naive_beams(model: Any, prompt: Sequence[int], oracle: Mapping[str, Any], num_beams: int, steps: int) -> list[Any]:
    """(tokens, score) of the beams that a search without an end token keeps, best first; each beam is a row of its own."""
    row = NaiveRow(model, len(prompt), **oracle)
    for token in prompt:
        logits_V = row.feed(token)
    beams = [(0.0, row, logits_V)]
    for step in range(steps):
        choices = []
        for score, row, logits_V in beams:
            # As transformers does it: log-probabilities over the whole vocabulary first, then the restriction.
            logp_V = logits_V.log_softmax(-1) + allowed(len(logits_V))
            choices += [(score + float(logp_V[token]), row, token) for token in ALLOWED]
        beams = []
        for score, row, token in sorted(choices, key=lambda choice: -choice[0])[:num_beams]:
            child = row.fork()
            # The token that was chosen last is never processed.
            beams.append((score, child, child.feed(token) if step + 1 < steps else child.ids.append(token)))
    return [(row.ids[len(prompt) :], score) for score, row, _ in beams]


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_beam_search_equals_a_naive_beam_search(kind: str, tmp_path: Path) -> None:
    model, steps, num_beams = model_of(kind), 9, 3
    residual = [(number % 3, 1.0, scope) for number, scope in enumerate(SCOPES) if scope != "step_end:stop"]
    plan, oracle = case(kind, tmp_path, residual, "after:3" if kind == "deepseek_v3" else None)
    prompts = [[5, 6, T, 30], [3, 10, 8, 7, T, 30, 40]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    settings = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": steps,
        "do_sample": False,
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "length_penalty": 0.0,
        "eos_token_id": None,
        "pad_token_id": 0,
        "logits_processor": LogitsProcessorList([Allow()]),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with steer(model, plan, tokenizer=tiny.TinyTokenizer()):
        out = model.generate(ids, **settings)
    bare = model.generate(ids, **settings)
    assert not torch.equal(out.sequences, bare.sequences)
    expected = [beam for prompt in prompts for beam in naive_beams(model, prompt, oracle, num_beams, steps)]
    assert out.sequences[:, width:].tolist() == [tokens for tokens, _ in expected]
    torch.testing.assert_close(
        out.sequences_scores.double(), torch.tensor([s for _, s in expected]).double(), atol=1e-4, rtol=0
    )
    assert len({token for tokens, _ in expected for token in tokens}) > 2, "beams without steps would prove nothing"


def test_the_beam_comparison_notices_rows_that_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowsRows, "_keep", lambda self, index: None)
    with pytest.raises(AssertionError):
        test_beam_search_equals_a_naive_beam_search("qwen2", tmp_path)


class StopInTurn(Allow):
    """Row by row: as many tokens as the row's first token says, then the end token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = super().__call__(input_ids, scores)
        for row, ids in enumerate(input_ids.tolist()):
            real = [i for i in ids if i]
            if len(real) >= 6 + real[0]:
                scores[row] = -torch.inf
                scores[row, tiny.STOP] = 0.0
        return scores


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_the_in_process_sampler_drops_rows_and_the_scopes_follow(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    residual = [(number % 3, 1.0, scope) for number, scope in enumerate(SCOPES)]
    plan, oracle = case(kind, tmp_path, residual, "thought" if kind == "deepseek_v3" else None)
    prompts = [[9, 5, T, 30], [3, 10, 8, 7, T, 30, 40], [12, T], [6, 6, 6, T, 10], [4, T, 40, E], [15, 30, T]]
    sampler = InProcessSampler(
        model, tiny.TinyTokenizer(), batch_size=6, processors=LogitsProcessorList([StopInTurn()])
    )
    requests = [Request(tuple(prompt), 0, i) for i, prompt in enumerate(prompts)]
    config = SamplingConfig(greedy=True, max_new_tokens=20)
    with steer(model, plan, tokenizer=tiny.TinyTokenizer()) as audit:
        got = {sample.key: list(sample.token_ids) for sample in sampler.sample(requests, config)}
    bare = {sample.key: list(sample.token_ids) for sample in sampler.sample(requests, config)}
    assert got != bare
    counts: dict[Any, int] = {}
    for number, prompt in enumerate(prompts):
        row, tokens = NaiveRow(model, len(prompt), **oracle), list(prompt)
        for token in prompt:
            logits_V = row.feed(token)
        while True:
            token = int(StopInTurn()(torch.tensor([tokens]), logits_V[None].float())[0].argmax())
            tokens.append(token)
            if token == tiny.STOP or len(tokens) - len(prompt) == config.max_new_tokens:
                break
            logits_V = row.feed(token)
        assert got[number] == tokens[len(prompt) :]
        for key, fired in row.fired.items():
            counts[key] = counts.get(key, 0) + fired
    assert len({len(tokens) for tokens in got.values()}) > 3, "rows must leave one by one"
    seen = {**audit.residual, **{key: fired.tokens for key, fired in audit.fired.items()}}
    assert {key: number for key, number in seen.items() if number} == counts
