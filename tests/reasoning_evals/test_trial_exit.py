"""Trial answers: they leave no trace in the row, are what a plain forward would say, and end the thought where they are sure."""

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from moe_steer.thinking import token_tags, token_texts
from narrow_families import narrow
from reasoning_evals.decoding import TrialExit
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.prompts import render_prompt
from test_sampling_families import Words, prompts
from tiny_reasoners import tiny_model, tiny_tokenizer

CONFIG = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=36, batch_size=16)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(spread=0.3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def rule_of(tokenizer: PreTrainedTokenizerFast, threshold: float, **how: object) -> TrialExit:
    tags = token_tags(tokenizer)
    assert tags is not None
    words = tuple((tokenizer.convert_tokens_to_ids(letter),) for letter in "abcdwxyz")
    trial = tuple(map(tokenizer.convert_tokens_to_ids, "\n{"))
    texts = ["".join("}" if letter in "aeiou" else letter for letter in text) for text in token_texts(tokenizer)]
    how = {"most_tokens": 6, "texts": tuple(texts), **how}
    return TrialExit(forms=words, tags=tags, trial=trial, threshold=threshold, **how)  # type: ignore[arg-type]


def requests(tokenizer: PreTrainedTokenizerFast) -> list[Request]:
    found = []
    for number in range(12):
        prompt = render_prompt(tokenizer, ["why", "how much is 2 + 2?", "a"][number % 3], thinking=number % 4 != 0)
        ids = (*prompt.token_ids, tokenizer.convert_tokens_to_ids("<think>")) if number % 4 else prompt.token_ids
        found.append(Request(ids, seed=number, key=number, prompt=prompt.text))
    return found


def sampled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rule: object, **how: object) -> dict:
    rules = LogitsProcessorList([rule] if rule else [])
    sampler = InProcessSampler(model, tokenizer, processors=rules, **how)  # type: ignore[arg-type]
    return {sample.key: sample.token_ids for sample in sampler.sample(requests(tokenizer), CONFIG)}


def naive_confidence(model: PreTrainedModel, ids: list[int], rule: TrialExit) -> float:
    """Whole forwards without a cache."""
    row, found, logs = [*ids, *rule.trial], [], []
    while len(found) < rule.most_tokens:
        with torch.inference_mode():
            shares = model(torch.tensor([row])).logits[0, -1].double().softmax(-1)
        found.append(int(shares.argmax()))
        logs.append(math.log(float(shares.max())))
        row.append(found[-1])
        if "}" in rule.texts[found[-1]]:
            return math.exp(sum(logs) / len(logs))
    return 0.0


def test_trials_leave_no_trace_and_a_batch_gives_what_each_row_gives_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    never = rule_of(tokenizer, 1.0)
    assert sampled(model, tokenizer, never) == sampled(model, tokenizer, None)
    assert never.counts["trials"] > 20
    assert never.counts["exits"] == 0
    some = rule_of(tokenizer, 0.2)
    together = sampled(model, tokenizer, some)
    assert together == sampled(model, tokenizer, rule_of(tokenizer, 0.2), batch_size=1)
    assert 0 < some.counts["exits"] < some.counts["trials"]


def test_a_thought_ends_exactly_where_a_plain_forward_finds_the_answer_sure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rule = rule_of(tokenizer, 0.2, most_trials=3)
    made = sampled(model, tokenizer, rule)
    plain = sampled(model, tokenizer, None)
    opening, closing = rule.tags.opening[0][0], rule.tags.close[0]
    words = {form[0] for form in rule.forms}
    exits = 0
    for request in requests(tokenizer):
        ids, first = list(request.prompt_ids), len(request.prompt_ids)
        ids += made[request.key]
        for place in range(first, len(ids)):
            before = ids[:place]
            tags = [token for token in before if token in (opening, closing)]
            inside = bool(tags) and tags[-1] == opening
            start = len(before) - before[::-1].index(opening) if inside else 0
            asked = inside and sum(token in words for token in before[start:]) < rule.most_trials
            if ids[place] in words and asked:
                assert naive_confidence(model, before, rule) < rule.threshold
            if ids[place] == closing and asked and plain[request.key][place - first : place - first + 1] != (closing,):
                exits += naive_confidence(model, before, rule) >= rule.threshold
    assert exits == rule.counts["exits"] > 0


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "deepseek_v3", "deepseek_v4"])
def test_a_copied_row_leaves_every_kind_of_cache_as_it_was(name: str) -> None:
    """Trials at every token of rows that share prompts, leave, and make room for others."""

    asked: list[Any] = []

    class Everywhere:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

        def interject(self, step) -> dict:  # type: ignore[no-untyped-def]
            asked.extend(step.trial(range(len(step.ids_BT)), (7, 8), 3, lambda ids: False))
            return {}

    tried = narrow(name)
    order = [Request(prompts()[number], 0, key) for key, number in enumerate((1, 0, 3, 1, 2, 0))]
    config = SamplingConfig(greedy=True, max_new_tokens=8)
    made = []
    for rules in ([], [Everywhere()]):
        sampler = InProcessSampler(tried, Words(), batch_size=4, processors=LogitsProcessorList(rules))
        made.append({sample.key: sample.token_ids for sample in sampler.sample(order, config)})
    assert made[0] == made[1]
    assert len(asked) >= 40
    assert {len(trial.token_ids) for trial in asked} == {3}


def test_a_text_of_several_tokens_is_written_to_its_end_in_each_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = tuple(map(tokenizer.convert_tokens_to_ids, "0123"))

    class Dictates:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

        def interject(self, step) -> dict:  # type: ignore[no-untyped-def]
            wanted = torch.isin(step.drawn_B, torch.tensor([tokenizer.convert_tokens_to_ids("x")])) & step.free_B
            return dict.fromkeys(map(int, wanted.nonzero()[:, 0]), text)

    together = sampled(model, tokenizer, Dictates())
    assert together == sampled(model, tokenizer, Dictates(), batch_size=1)
    told = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in together.values()]
    assert not any("x" in text for text in told)
    assert sum("0123" in text for text in told) >= 3


def test_an_answer_ends_with_the_brace_that_the_trial_opened(tokenizer: PreTrainedTokenizerFast) -> None:
    rule = rule_of(tokenizer, 0.5, texts=token_texts(tokenizer))
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "{}12\n"}
    assert not rule.is_closed([ids["1"], ids["{"], ids["2"], ids["}"]])
    assert rule.is_closed([ids["1"], ids["{"], ids["2"], ids["}"], ids["}"]])
    assert not rule.is_closed([])
    assert rule.confidence(type("T", (), {"token_ids": (ids["1"],), "probabilities": (1.0,)})) == 0.0
    with pytest.raises(ValueError, match="the threshold is 1.5"):
        rule_of(tokenizer, 1.5)
