"""Rows one behind the other, joining and leaving, in pieces of any length: the scopes of each against its whole text, uncached."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from moe_steer.thinking import TokenTags
from moe_steer.tokens import Batch, PositionTracker, RaggedScopes, RowState, special_tokens
from naive_scopes import SCOPES

IDS = st.lists(
    st.sampled_from([1, 2, 10, 11, 12, 21, 22, 30, 31, 32, 40, 41, 50, 51, tiny.THINK, tiny.END_THINK]),
    min_size=2,
    max_size=16,
)
PLAIN = special_tokens(tiny.TinyTokenizer())
LONG_TAGS = dataclasses.replace(PLAIN, tags=TokenTags.of_pair([1, 2, 30], [2, 31]))
SILENT = dataclasses.replace(PLAIN, tags=None)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(IDS, min_size=1, max_size=4),
    special=st.sampled_from([PLAIN, LONG_TAGS, SILENT]),
    data=st.data(),
)
def test_every_way_of_batching_gives_the_scopes_of_the_whole_text(
    rows: list[list[int]], special: tiny.Any, data: st.DataObject
) -> None:
    scopes = [name for name in SCOPES if special.tags is not None or name not in ("thought", "answer")]
    prompts = [data.draw(st.integers(1, len(row))) for row in rows]
    ragged = RaggedScopes(scopes, special)
    state = RowState.of_new_rows(len(rows), special)
    fed, got = [0] * len(rows), [torch.zeros(len(scopes), 0, dtype=torch.bool) for _ in rows]
    while waiting := [r for r, row in enumerate(rows) if fed[r] < len(row)]:
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        counts = [data.draw(st.integers(1, len(rows[r]) - fed[r])) for r in chosen]
        ids_T = torch.tensor([i for r, n in zip(chosen, counts, strict=True) for i in rows[r][fed[r] : fed[r] + n]])
        batch = Batch.of(
            torch.tensor(counts),
            torch.tensor([fed[r] for r in chosen]),
            torch.tensor([prompts[r] for r in chosen]),
            len(ids_T),
        )
        masks, after = ragged.masks(batch, ids_T, RowState(*(part[chosen] for part in state)))
        for whole, part in zip(state, after, strict=True):
            whole[chosen] = part
        for r, piece in zip(chosen, masks.split(counts, dim=1), strict=True):
            got[r] = torch.cat([got[r], piece], 1)
            fed[r] += piece.shape[1]
    for row, prompt, found in zip(rows, prompts, got, strict=True):
        track = PositionTracker(scopes, special, [prompt])
        track.before({"input_ids": torch.tensor([row]), "use_cache": False})
        for name, mask_T in zip(scopes, found, strict=True):
            whole_T = track.mask(name)
            expected = [True] * len(row) if whole_T is None else whole_T.tolist()
            assert mask_T.tolist() == expected, name


def test_positions_alone_need_neither_ids_nor_a_tokenizer() -> None:
    ragged = RaggedScopes(["all", "prompt", "generated", "after:2"], None)
    assert not ragged.follows_tags
    batch = Batch.of(torch.tensor([3, 1]), torch.tensor([0, 9]), torch.tensor([2, 7]), 4)
    masks, _ = ragged.masks(batch, torch.zeros(4, dtype=torch.long), RowState.of_new_rows(2, None))
    assert masks.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
