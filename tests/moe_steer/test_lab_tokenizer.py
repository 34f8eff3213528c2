"""The lab's tokenizer: any text round-trips, digits stay single, thought markers survive decoding."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launch.lab.batches import corpus
from launch.lab.models import EOS, prompt_text, train_tokenizer
from moe_steer.lab import LAB_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(LAB_MODEL)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < len(tokenizer)


@settings(deadline=None, max_examples=50)
@given(number=st.integers(0, 10**12), before=st.sampled_from(["", " ", "= ", "x", "(", "\n"]))
def test_each_digit_is_one_token(tokenizer: PreTrainedTokenizerBase, number: int, before: str) -> None:
    ids = tokenizer(f"{before}{number}", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids][-len(str(number)) :] == list(str(number))


def test_thought_markers_are_single_tokens_that_decoding_keeps(tokenizer: PreTrainedTokenizerBase) -> None:
    for marker in ("<think>", "</think>"):
        ids = tokenizer(f"1.{marker}\n", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids(marker)) == 1
        assert marker in tokenizer.decode(ids, skip_special_tokens=True)
    assert EOS not in tokenizer.decode(tokenizer(f"1{EOS}")["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("word", ["Wait", "Hmm", "Alternatively"])
def test_reasoning_words_are_single_tokens_with_and_without_space(
    tokenizer: PreTrainedTokenizerBase, word: str
) -> None:
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1


def test_a_step_ends_in_a_full_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("3 * 4 = 12. Wait, let me check.</think>\n", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids].count(".") == 2


def test_chat_template_opens_the_thought(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert opened == prompt_text("What is 2 + 3?")
    assert opened.endswith("<think>\n")
    closed = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "<think>" not in closed
    turns = [*chat, {"role": "assistant", "content": "so 5.</think>\nIt is 5."}, *chat]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "so 5." not in text
    assert f"It is 5.{EOS}" in text
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_learning_the_tokenizer_is_deterministic() -> None:
    first, second = (train_tokenizer(corpus(300, seed=1)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(first("né 7日 \U0001f600\n")["input_ids"]) == "né 7日 \U0001f600\n"
