"""Prompts that run once for both answers: where every token stands, that nothing changes by it, and who is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe_steer.contrasts.collect as contrasts
from expert_stats import MarkedSequence, collect_contrast
from families import available, build
from moe_steer.contrasts.rows import Row, _agrees, arguments, can_share, marks, packed
from test_contrast_families import REFUSED, SEVERAL_STREAMS
from tiny import hook_count, qwen2

PROMPT = tuple(range(5, 13))
PAIRS = [
    MarkedSequence("0a", (*PROMPT, 20, 21, 22, 23, 24, 25), positive=(9, 12), pair="0"),
    MarkedSequence("0b", (*PROMPT, 40, 41, 42), negative=(8, 9), pair="0"),
    MarkedSequence("1a", (*PROMPT[1:], 30, 31), positive=(5, 7), pair="1"),
    MarkedSequence("1b", (*PROMPT[1:], 30, 50, 51), negative=(6, 9), pair="1"),
    MarkedSequence("alone", tuple(range(60, 70)), positive=(3,), negative=(8,)),
]
NOT_SHARING = {
    "axk2", "axk2_groups", "bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "granitemoehybrid", "inkling", "jamba",
    "kimi_linear", "lfm2_moe", "llama4", "minimax", "mistral_large4", "nemotron_h", "qwen3_5_moe", "qwen3_next",
    "unlimited_ocr", "dots3_note", "inkling2", "lara_mini",
}  # fmt: skip
"""Recurrent, chunked or sparse layers, or a sliding window shorter than the pairs."""


def plain(monkeypatch: pytest.MonkeyPatch, model: Any, **options: Any) -> Any:
    """The pass with a row for every sequence."""
    with monkeypatch.context() as patch:
        patch.setattr(contrasts, "can_share", lambda *_: False)
        return collect_contrast(model, PAIRS, [0, 1], **options)


@pytest.mark.parametrize("name", [name for name in available() if name not in SEVERAL_STREAMS | set(REFUSED)])
def test_a_shared_prompt_changes_nothing_in_any_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    assert can_share(model, packed(PAIRS), 1) == (name not in NOT_SHARING)
    shared, alone = collect_contrast(model, PAIRS, [0, 1]), plain(monkeypatch, model)
    for layer in (0, 1):
        mine, other = shared[layer].difference_D, alone[layer].difference_D
        assert float((mine - other).abs().max()) <= 1e-5 * float(other.abs().max())
        assert shared[layer].positive.num_tokens == alone[layer].positive.num_tokens == 5
    assert hook_count(model) == 0


def test_pairs_are_packed_and_every_answer_is_blind_to_the_other() -> None:
    alone, first, second = packed(PAIRS)
    assert [row.prefix for row in (alone, first, second)] == [0, 8, 8]  # 30 is common as well
    assert (first.needed, first.saved, first.starts()) == (5 + 2 + 8, 8, [8, 13])
    call = arguments([first, alone], torch.device("cpu"), torch.float32)
    assert call["input_ids"][0].tolist() == [*PROMPT, 20, 21, 22, 23, 24, 40, 41]
    assert call["position_ids"][0].tolist() == [*range(13), 8, 9]
    seen_SS = call["attention_mask"][0, 0] == 0
    assert seen_SS[12].nonzero().flatten().tolist() == list(range(13))
    assert seen_SS[14].nonzero().flatten().tolist() == [*range(8), 13, 14]
    assert (call["attention_mask"][:, 0] == 0).any(-1).all()  # padding sees something
    where = marks([first, alone], "negative")
    assert (where.row_T.tolist(), where.slot_T.tolist(), where.sizes) == ([0, 0, 1], [13, 14, 8], [2, 1])


@settings(max_examples=60, deadline=None)
@given(
    common=st.lists(st.integers(1, 3), max_size=12),
    own=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=2, max_size=3),
    data=st.data(),
)
def test_every_mark_finds_its_token(common: list[int], own: list[list[int]], data: st.DataObject) -> None:
    items = []
    for number, answer in enumerate(own):
        ids = (*common, *answer)
        positions = data.draw(st.sets(st.integers(0, len(ids) - 1), min_size=1))
        items.append(MarkedSequence(str(number), ids, positive=tuple(positions), pair="x"))
    rows = packed(items)
    call = arguments(rows, torch.device("cpu"), torch.float32)
    where = marks(rows, "positive")
    expected = [item.token_ids[position] for item in where.members for position in item.positive]
    assert call["input_ids"][where.row_T, where.slot_T].tolist() == expected
    assert sorted(item.name for item in where.members) == sorted(item.name for item in items)
    assert sum(row.needed for row in rows) == sum(item.needed for item in items) - sum(row.saved for row in rows)
    if "position_ids" in call:
        places = [position for item in where.members for position in item.positive]
        assert call["position_ids"][where.row_T, where.slot_T].tolist() == places


def test_little_in_common_and_very_long_rows_stay_apart() -> None:
    long = MarkedSequence("a", tuple(range(100)), positive=(99,), pair="0")
    short = MarkedSequence("b", (0, 1, 99), negative=(2,), pair="0")
    assert [row.prefix for row in packed([long, short])] == [0, 0]
    huge = [MarkedSequence(name, (*range(2000), int(name)), (), (2000,), pair="0") for name in ("7", "8")]
    assert [row.prefix for row in packed(huge)] == [2000]
    huge = [MarkedSequence(name, (*range(2100), int(name)), (), (2100,), pair="0") for name in ("7", "8")]
    assert [row.prefix for row in packed(huge)] == [0, 0]


def test_a_hooked_model_and_other_attention_share_nothing() -> None:
    model, rows = qwen2(), packed(PAIRS)
    model(torch.tensor([[5, 6]]), output_hidden_states=True)  # transformers' own hooks stay, and are no reason
    assert can_share(model, rows, 1)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not can_share(model, rows, 1)
    handle.remove()
    kept = model.config._attn_implementation
    try:
        model.config._attn_implementation = "flash_attention_2"
        assert not can_share(model, rows, 1)
    finally:
        model.config._attn_implementation = kept


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_the_trial_notices_a_decoder_that_ignores_an_argument(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen2()
    row = next(row for row in packed(PAIRS) if row.saved)
    assert _agrees(model, row, 1)
    decoder: nn.Module = model.model
    forward = decoder.forward

    def deaf(**call: Any) -> Any:
        return forward(**{key: value for key, value in call.items() if key != lost})

    monkeypatch.setattr(decoder, "forward", deaf)
    assert not _agrees(model, row, 1)


def test_the_trial_notices_a_decoder_that_refuses() -> None:
    model = qwen2()
    row = Row((PAIRS[0], PAIRS[1]), 8)
    kept = model.model.forward
    try:
        model.model.forward = lambda input_ids, attention_mask, use_cache: None  # takes no positions
        assert not _agrees(model, row, 1)
    finally:
        del model.model.forward
    assert model.model.forward == kept
    assert _agrees(model, row, 1)
    assert hook_count(model) == 0
