"""The decoding rules and the thinking prompts in the sampler: batches whose rows open, close and leave at different times."""

import pytest
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from moe_steer.thinking import token_tags
from reasoning_evals.decoding import Ban, SwitchPenalty, ThinkingBudget
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.prompts import (
    THINKING_PROMPT,
    prompt_before_thought,
    prompt_inside_thought,
    render_prompt,
    thinking_format,
)
from tiny_reasoners import tiny_model, tiny_tokenizer

QUESTIONS = ["why", "how much is 2 + 2?", "a", "what is a very long question about?"]
CONFIG = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=40, batch_size=16)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(spread=0.3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def requests(tokenizer: PreTrainedTokenizerFast) -> list[Request]:
    """Some prompts end inside the thought, some leave it to the model to open one."""
    found = []
    for number in range(16):
        prompt = render_prompt(tokenizer, QUESTIONS[number % 4], thinking=number % 3 != 0)
        found.append(Request(prompt.token_ids, seed=number, key=number, prompt=prompt.text))
    return found


def rules_of(tokenizer: PreTrainedTokenizerFast) -> list:
    tags = token_tags(tokenizer)
    assert tags is not None
    words = tuple((tokenizer.convert_tokens_to_ids(letter),) for letter in "abcxyz123")
    return [
        SwitchPenalty(forms=words, tags=tags, alpha=4.0, beta=5),
        Ban(forms=((tokenizer.convert_tokens_to_ids("e"),), tuple(map(tokenizer.convert_tokens_to_ids, "th")))),
        ThinkingBudget(num_tokens=9, tags=tags),
    ]


def test_a_batch_gives_what_each_row_gives_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = requests(tokenizer)
    rules = LogitsProcessorList(rules_of(tokenizer))
    together = {
        sample.key: sample.token_ids
        for sample in InProcessSampler(model, tokenizer, processors=rules).sample(asked, CONFIG)
    }
    alone = InProcessSampler(model, tokenizer, batch_size=1, processors=rules)
    assert together == {sample.key: sample.token_ids for sample in alone.sample(asked, CONFIG)}
    assert len({len(ids) for ids in together.values()}) > 2, "rows leave the batch at different times"
    plain = InProcessSampler(model, tokenizer)
    assert together != {sample.key: sample.token_ids for sample in plain.sample(asked, CONFIG)}


def test_what_is_banned_is_not_written_and_no_thought_is_longer_than_its_budget(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rules = LogitsProcessorList(rules_of(tokenizer))
    asked = requests(tokenizer)
    longest = 0
    for sample in InProcessSampler(model, tokenizer, processors=rules).sample(asked, CONFIG):
        prompt = asked[sample.key].prompt_ids
        texts = tokenizer.convert_ids_to_tokens([*prompt, *sample.token_ids])
        assert "e" not in texts[len(prompt) :]
        assert ("t", "h") not in zip(texts[len(prompt) - 1 :], texts[len(prompt) :], strict=False)
        held = None
        for text in texts:
            held = 0 if text == "<think>" else None if text == "</think>" or held is None else held + 1
            assert held is None or held <= 9
            longest = max(longest, held or 0)
    assert longest == 9


def test_the_thinking_prompt_stands_before_or_inside_the_thought(tokenizer: PreTrainedTokenizerFast) -> None:
    before = prompt_before_thought(tokenizer, " be careful. ")("why?")
    assert before.text == "<s><|user|>why?<|assistant|>be careful.\n<think>\n"
    assert thinking_format(tokenizer).opens(before.text)
    inside = prompt_inside_thought(tokenizer, "be careful.")("why?")
    assert inside.text == "<s><|user|>why?<|assistant|><think>\nbe careful.\n"
    for prompt in (before, inside):
        assert "".join(tokenizer.convert_ids_to_tokens(prompt.token_ids)) == prompt.text
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    quoting = prompt_before_thought(tokenizer, "careful.")("what is <think>?")
    assert quoting.text.endswith("what is <think>?<|assistant|>careful.\n<think>\n")
    assert THINKING_PROMPT in prompt_inside_thought(tokenizer)("why?").text


@pytest.mark.parametrize("text", ["", "  ", "go <think>", "stop </think>"])
def test_a_thinking_prompt_that_would_break_the_thought_is_refused(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    for make in (prompt_before_thought, prompt_inside_thought):
        with pytest.raises(ValueError, match="the thinking prompt is"):
            make(tokenizer, text)
