"""The tracker against a token-by-token reading of the definitions, over every way of feeding the same text."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from families import batch, build
from family_cases import padded
from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.layers import moe_layers
from moe_steer.tokens.positions import PositionTracker, special_tokens
from naive_scopes import SCOPES, in_scope

IDS = st.lists(
    st.sampled_from([1, 2, 10, 11, 12, 21, 22, 30, 31, 32, 40, 41, 50, 51, tiny.THINK, tiny.END_THINK]),
    min_size=2,
    max_size=14,
)


class FakeCache:
    """The three things that the tracker needs of a cache."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Any) -> None: ...

    def reorder_cache(self, beam_idx: Any) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def crop(self, tokens_to_remove: int) -> None: ...


def naive(ids: list[int], prompt: int) -> dict[str, list[bool]]:
    """One token at a time, straight from the definitions."""
    return {scope: [in_scope(scope, ids[: i + 1], prompt) for i in range(len(ids))] for scope in SCOPES}


def tracker(**options: Any) -> PositionTracker:
    return PositionTracker(SCOPES, special_tokens(tiny.TinyTokenizer()), **options)


def feed(track: PositionTracker, cache: Any, ids_BS: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    call = {"input_ids": ids_BS, "attention_mask": mask, "past_key_values": cache}
    track.before(call)
    found = {scope: track.mask(scope) for scope in SCOPES}
    every = torch.ones(ids_BS.shape, dtype=torch.bool)  # None stands for every token
    masks = {scope: every if mask_T is None else mask_T.reshape(ids_BS.shape) for scope, mask_T in found.items()}
    cache.length += ids_BS.shape[1]
    track.after(call, None)
    return masks


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(IDS, min_size=1, max_size=4), cut=st.integers(1, 6), step=st.integers(1, 3))
def test_left_padded_prefill_and_chunked_decode(rows: list[list[int]], cut: int, step: int) -> None:
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    cut = max(cut, length - min(len(row) for row in rows) + 1)  # every row has a token in the prefill
    cut = min(cut, length)
    track, cache, got = tracker(), FakeCache(), []
    for start, stop in [(0, cut), *[(i, min(i + step, length)) for i in range(cut, length, step)]]:
        got.append(feed(track, cache, ids[:, start:stop], real[:, :stop]))
    for b, row in enumerate(rows):
        padding = length - len(row)
        expected = naive(row, cut - padding)
        for scope in SCOPES:
            mask = torch.cat([chunk[scope][b] for chunk in got]).tolist()
            assert mask == [False] * padding + expected[scope], scope


def test_paragraphs_over_chunks_padding_and_reordered_rows() -> None:
    """A line end at the end of one forward makes a paragraph of the line end that opens the next one, in the same row only."""
    track, cache = tracker(), FakeCache()
    real = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    first = feed(track, cache, torch.tensor([[40, tiny.THINK, 30], [tiny.THINK, 40, 7], [30, tiny.THINK, 40]]), real)
    assert not first["step_end:paragraph"].any()
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    step = feed(track, cache, torch.tensor([[40], [40], [30]]), torch.ones(3, 4))
    assert step["step_end:paragraph"].flatten().tolist() == [True, False, False]  # a line of words is no blank line
    step = feed(track, cache, torch.tensor([[40], [40], [40]]), torch.ones(3, 5))
    assert step["step_end:paragraph"].all()


def test_padding_on_either_side_is_no_line_end() -> None:
    track, cache = tracker(), FakeCache()
    ids = torch.tensor([[40, tiny.THINK, 40, 5], [tiny.THINK, 5, 30, 40]])
    feed(track, cache, ids, torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))
    step = feed(track, cache, torch.tensor([[40], [40]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]]))
    assert not step["step_end:paragraph"].any()


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(IDS, min_size=2, max_size=4), data=st.data())
def test_right_padded_whole_texts_with_prompt_lengths(rows: list[list[int]], data: Any) -> None:
    length = max(len(row) for row in rows)
    prompts = [data.draw(st.integers(0, len(row))) for row in rows]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    got = feed(tracker(prompt_lengths=prompts), FakeCache(), ids, real)
    for b, row in enumerate(rows):
        for scope, expected in naive(row, prompts[b]).items():
            assert got[scope][b].tolist() == expected + [False] * (length - len(row))


def test_rows_are_followed_when_they_are_dropped_reordered_and_repeated() -> None:
    T, E = tiny.THINK, tiny.END_THINK
    track, cache = tracker(), FakeCache()
    feed(track, cache, torch.tensor([[1, 1], [1, T], [T, E]]), torch.ones(3, 2))
    cache.batch_select_indices(torch.tensor([2, 1]))
    step = feed(track, cache, torch.tensor([[5], [5]]), torch.ones(2, 3))
    assert step["answer"].tolist() == [[True], [False]]
    assert step["thought"].tolist() == [[False], [True]]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    step = feed(track, cache, torch.tensor([[5]] * 4), torch.ones(4, 4))
    assert step["thought"].flatten().tolist() == [True, True, False, False]


def test_refusals() -> None:
    cache = FakeCache()
    cache.length = 4
    with pytest.raises(ValueError, match="filled before steer"):
        feed(tracker(), cache, torch.tensor([[1]]), torch.ones(1, 5))
    call = {"input_ids": torch.tensor([[1, 2]]), "use_cache": False}
    with pytest.raises(ValueError, match="pass prompt_lengths"):
        tracker().before(call)
    with pytest.raises(ValueError, match="1 prompt_lengths for 2 rows"):
        tracker(prompt_lengths=[1]).before({"input_ids": torch.ones(2, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="needs an attention mask that says"):
        tracker().before({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 1, 2, 1)})
    with pytest.raises(ValueError, match="needs token ids"):
        tracker().before({"inputs_embeds": torch.ones(1, 2, 8), "use_cache": True})
    packed = {"input_ids": torch.tensor([[1, 2, 3]]), "use_cache": True}
    for where in ({"position_ids": torch.tensor([[0, 1, 0]])}, {"cu_seq_lens_q": torch.tensor([0, 2, 3])}):
        with pytest.raises(ValueError, match="packed into one row"):
            tracker().before({**packed, **where})
    tracker().before({**packed, "position_ids": torch.tensor([[4, 5, 6]])})
    cache = FakeCache()
    track = tracker()
    feed(track, cache, torch.tensor([[1, 2]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="turn assisted decoding off"):
        cache.crop(1)
    cache.length += 1
    with pytest.raises(ValueError, match="has lost its place: run all forwards of a text"):
        feed(track, cache, torch.tensor([[1]]), torch.ones(1, 4))


def test_padding_opens_no_thought_whatever_its_id() -> None:
    track, cache = tracker(), FakeCache()
    ids = torch.tensor([[tiny.THINK, 5, 10], [5, tiny.THINK, tiny.END_THINK]])
    first = feed(track, cache, ids, torch.tensor([[0, 1, 1], [1, 1, 0]]))
    assert first["thought"].tolist() == [[False] * 3, [False, True, False]]
    step = feed(track, cache, torch.tensor([[10], [10]]), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]]))
    assert step["step_end"].flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("qwen3_moe", "eager"),
        ("gpt_oss", "eager"),
        *((name, "sdpa") for name in ("qwen3_moe", "gemma4", "lfm2_moe", "llama4")),
    ],
)
def test_a_static_cache_hides_no_padding(name: str, attention: str) -> None:
    """Its masks say what each token may look at: by layer, as truth values or as numbers to add."""
    model = build(name)
    inputs = padded([batch(2, 9)[0], batch(2, 9)[1, :5]], "left")
    inputs.pop("position_ids")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    layer = moe_layers(model)[-1]
    gains = [ExpertGain(layer.index, expert, 4.0) for expert in range(layer.num_experts)]
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        for scope in ("all", "prompt", "generated", "after:2"):
            made = []
            for kind in ("dynamic", "static"):
                with steer(model, SteeringPlan(experts=gains, scope=scope), quiet=True) as audit:
                    ids_BS = model.generate(**inputs, **options, cache_implementation=kind)
                made.append((ids_BS.tolist(), {key: fired.tokens for key, fired in audit.fired.items()}))
            assert made[0] == made[1], scope
            tokens = {"all": 14 + 10, "prompt": 14, "generated": 10, "after:2": 6}[scope]
            assert sum(made[1][1].values()) == tokens * layer.top_k
    finally:
        model.set_attn_implementation(before)
