from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from moe_steer.inside import cache_of
from reasoning_evals.engines import batch
from reasoning_evals.engines.in_process import InProcessSampler, stop_ids
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.prompts import render_prompt, thinking_format
from tiny_reasoners import TEMPLATE, tiny_model, tiny_tokenizer

QUESTIONS = ["what is 1+1?", "compute 12*3 and then add 4, please.", "why?", "2+2", "why?", "a long question, " * 4]
KINDS = ("deepseek_v3", "qwen2")


def requests_for(sampler: InProcessSampler, questions: list[str] = QUESTIONS) -> list[Request]:
    return [Request(sampler.render(q).token_ids, 100 + i, i) for i, q in enumerate(questions)]


def draw_all(sampler: InProcessSampler, requests: list[Request], **config: object) -> dict[int, tuple[int, ...]]:
    settings = SamplingConfig(**{"max_new_tokens": 60, **config})  # type: ignore[arg-type]
    return {sample.key: sample.token_ids for sample in sampler.sample(requests, settings)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_greedy_equals_generate_token_for_token(kind: str, batch_size: int) -> None:
    model = tiny_model(kind, seed=3)
    # Many stop ids, so that rows finish at different steps and the batch shrinks.
    model.generation_config.eos_token_id = [1, 20, 33, 47]
    sampler = InProcessSampler(model, tiny_tokenizer(), batch_size=batch_size)
    requests = requests_for(sampler)
    ours = draw_all(sampler, requests, greedy=True)
    lengths = set()
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=60)
        assert ours[request.key] == tuple(expected[0, prompt.shape[1] :].tolist())
        lengths.add(len(ours[request.key]))
    assert len(lengths) > 1, "the case must have rows that finish early"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_neighbours(kind: str) -> None:
    model = tiny_model(kind, seed=1)
    model.generation_config.eos_token_id = [1, 20, 33]
    sampler = InProcessSampler(model, tiny_tokenizer())
    requests = requests_for(sampler)
    together = draw_all(sampler, requests)
    assert together == draw_all(sampler, requests[::-1])
    for request in requests:
        assert draw_all(sampler, [request]) == {request.key: together[request.key]}
    assert together[2] != together[4], "the same prompt with another seed gives another sample"


def test_stop_token_ends_the_sample_and_stays_in_its_ids_only() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(8, 40))
    sampler = InProcessSampler(model, tokenizer)
    config = SamplingConfig(max_new_tokens=3, batch_size=4)
    samples = list(sampler.sample([Request((0, 9), seed, seed) for seed in range(60)], config))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert 1 <= len(sample.token_ids) <= 3
        assert all(token not in sampler.stop_ids for token in sample.token_ids[:-1])
        assert (sample.token_ids[-1] in sampler.stop_ids) == (sample.finish_reason == "stop")
        shown = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
        assert sample.text == tokenizer.decode(shown)


def test_stop_ids_come_from_generation_config_or_config_and_from_the_tokenizer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 3]
    assert stop_ids(model, tokenizer) == (1, 3, 7)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = 9
    assert stop_ids(model, tokenizer) == (1, 9)
    model.config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (1,)
    tokenizer.eos_token = None
    assert stop_ids(model, tokenizer) == ()


class _Ban(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token, self.lengths = token, set[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.add(input_ids.shape[1])
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


def test_processors_see_the_tokens_so_far_and_change_the_scores() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    plain = InProcessSampler(model, tokenizer)
    requests = requests_for(plain, ["why?"])
    first = draw_all(plain, requests, greedy=True, max_new_tokens=5)[0][0]
    ban = _Ban(first)
    banned = InProcessSampler(model, tokenizer, processors=LogitsProcessorList([ban]))
    assert first not in draw_all(banned, requests, greedy=True, max_new_tokens=5)[0]
    width = len(requests[0].prompt_ids)
    assert ban.lengths <= set(range(width, width + 5))
    assert banned.describe()["processors"] == ["_Ban"]


def test_rows_leave_through_the_cache_with_a_full_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(seed=1), tiny_tokenizer()
    model.generation_config.eos_token_id = [1, 20, 33]
    rows, selected = [], []
    original = batch.select_rows
    monkeypatch.setattr(
        batch,
        "select_rows",
        lambda cache, indices, num_rows: (selected.append(len(indices)), original(cache, indices, num_rows))[1],
    )

    def watch(_: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        past = cache_of(kwargs).get_seq_length()
        tokens, mask = kwargs["input_ids"], kwargs["attention_mask"]
        assert mask.shape == (tokens.shape[0], past + tokens.shape[1])
        assert (kwargs["position_ids"][:, -1] == mask.sum(-1) - 1).all()
        rows.append(tokens.shape[0])

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    sampler = InProcessSampler(model, tokenizer)
    out = draw_all(sampler, requests_for(sampler))
    handle.remove()
    # No row is decoded after its stop token: a row of n tokens takes part in the prefill and n - 1 steps.
    assert sum(rows[1:]) == sum(len(ids) - 1 for ids in out.values())
    assert rows[0] == len(set(QUESTIONS)), "equal prompts are filled in once"
    assert selected[0] == len(QUESTIONS)
    assert set(rows[1:]) <= set(selected)


def test_bad_logits_are_refused_in_one_line() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    sampler = InProcessSampler(model, tiny_tokenizer())
    for config in ({}, {"greedy": True}, {"top_p": 1.0}, {"top_k": 5}):
        with pytest.raises(ValueError, match="logits that are not numbers"):
            draw_all(sampler, requests_for(sampler), **config)


def test_a_request_without_ids_is_refused() -> None:
    sampler = InProcessSampler(tiny_model(), tiny_tokenizer())
    with pytest.raises(ValueError, match="request 'x' has no prompt ids"):
        list(sampler.sample([Request((), 1, "x")], SamplingConfig()))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0: for the argmax use greedy"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_name_value_and_remedy(values: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingConfig(**values)  # type: ignore[arg-type]


def test_config_round_trip_and_unknown_key() -> None:
    config = SamplingConfig(top_k=5, greedy=True)
    assert SamplingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown sampling settings \['topk'\]"):
        SamplingConfig.from_dict({"topk": 5})


def test_prompt_opens_the_thought_once_and_doubles_no_bos() -> None:
    tokenizer = tiny_tokenizer()
    prompt = render_prompt(tokenizer, "why?")
    assert prompt.text == "<s><|user|>why?<|assistant|><think>\n"
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert render_prompt(tokenizer, "why?", thinking=False).text == "<s><|user|>why?<|assistant|>"
    opened = tiny_tokenizer(TEMPLATE + "<think>")
    assert render_prompt(opened, "why?").text.count("<think>") == 1
    assert not thinking_format(opened).opens("<|user|>what does <think> do?<|assistant|>")


def test_no_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="has no chat template: give one with --chat-template FILE"):
        render_prompt(tiny_tokenizer(template=None), "why?")
