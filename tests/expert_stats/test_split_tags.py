"""Tags of several tokens, whose ends merge with their neighbours: found wherever the text has them, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expert_stats import MarkerSet

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRAIN = "<think>\nOkay so <think>\n\n</think>\n\nThe answer </think>\n\n <think></think>\n a>\n b>\n\n c></d> "
CASES = Path(__file__).parents[3] / "shared" / "cases" / "reports" / "tags.json"


def trained(train: str = TRAIN, split: str = SPLIT, vocabulary: int = 420) -> Any:
    """A byte-level BPE in which no tag is a token, and many tokens hold a piece of one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [train] * 200, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def markers() -> tuple[Any, MarkerSet]:
    tokenizer = trained()
    return tokenizer, MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"), split_tags=True)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", "\n\n", " ", "a", "(", ").", "é"]),
        max_size=12,
    )
)
def test_a_split_tag_is_found_wherever_the_text_has_it(markers: tuple[Any, MarkerSet], parts: list[str]) -> None:
    tokenizer, found = markers
    text = "".join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = found.find_occurrences(ids) if ids else {name: [] for name in found.names}
    for name in ("<think>", "</think>"):
        assert len(spans[name]) == text.count(name)
        for span in spans[name]:
            assert name in tokenizer.decode(ids[span.start : span.stop])
            assert name not in tokenizer.decode(ids[span.start + 1 : span.stop])
            assert name not in tokenizer.decode(ids[span.start : span.stop - 1])


@pytest.mark.skipif(not CASES.is_file(), reason="the cases are not beside the checkout")
def test_tags_of_the_reports() -> None:
    given_case = json.loads(CASES.read_text())
    tokenizer = trained(given_case["train"], given_case["split"], given_case["vocab"])
    found = MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"), split_tags=True)
    for case in given_case["cases"]:
        spans = found.find_occurrences(tokenizer.encode(case["text"], add_special_tokens=False))
        assert {name: len(places) for name, places in spans.items()} == case["expect"], case["text"]


def test_a_tag_that_is_not_one_token_is_refused_unless_it_may_be_split() -> None:
    with pytest.raises(ValueError, match="marker '<think>' is not a token of this tokenizer"):
        MarkerSet.from_tokenizer(trained(), ("<think>",))
