"""The letter of largest probability, against a forward of each prompt on its own."""

import pytest
import torch

from reasoning_evals.engines.first_letter import FirstLetterSampler, letter_mass
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.grading.answers import extract_answer
from tiny_reasoners import tiny_model, tiny_tokenizer

LETTERS = "abcd"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_answers_with_the_likeliest_letter(batch_size: int) -> None:
    model, tokenizer = tiny_model("llama", spread=0.5), tiny_tokenizer()
    sampler = FirstLetterSampler(model, tokenizer, LETTERS)
    prompts = [sampler.render(text) for text in ("which?", "and which of these?", "x", "the last one?")]
    requests = [Request(prompt.token_ids, 0, number, prompt.text) for number, prompt in enumerate(prompts)]
    samples = {sample.key: sample for sample in sampler.sample(requests, SamplingConfig(batch_size=batch_size))}
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            chance = model(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)[ids]
        best = LETTERS[int(chance.argmax())]
        found = extract_answer(samples[number].text, "choice")
        assert found is not None
        assert found.text == best
        assert samples[number].token_ids == (ids[LETTERS.index(best)],)
        mass = letter_mass(samples[number].text)
        assert mass == pytest.approx(float(chance.sum()), abs=2e-5)
    assert letter_mass("\\boxed{B}") is None
    assert not prompts[0].text.endswith("<think>\n")
    assert sampler.describe()["letters"]["a"] == [ids[0]]


def test_a_letter_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token of its own for 'A': use generated answers"):
        FirstLetterSampler(tiny_model("llama"), tiny_tokenizer())
