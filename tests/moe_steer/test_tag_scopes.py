"""Scopes thought and answer under tags of one and of several tokens, in pieces of any length, against the text itself."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_steer.thinking import FORMATS, PromptSettings, token_tags, use_prompt_settings
from moe_steer.tokens.positions import PositionTracker
from moe_steer.tokens.scopes import special_tokens
from published_templates import TAGS, byte_tokenizer
from test_positions import FakeCache

NAMES = [
    name for name, fmt in FORMATS.items() if fmt.thinks and fmt.open.isascii()
]  # a byte of a letter has no place in the text
SCOPES = ("thought", "answer", "step_end:line")


@functools.cache
def tokenizer_of(name: str, tags: tuple[str, ...]) -> Any:
    """A tokenizer whose model writes its thoughts so; the same for all examples, since its tags are found by hundreds of trials."""
    tokenizer = byte_tokenizer(list(tags))
    use_prompt_settings(tokenizer, PromptSettings(thinking=name))
    return tokenizer


def expected(name: str, text: str, starts: list[int]) -> dict[str, list[bool]]:
    """From the text: a phase begins with the token that holds the last character of a tag."""
    fmt = FORMATS[name]
    borders = []
    for switch in fmt.switches:
        place = text.find(switch.text)
        while place >= 0:
            borders.append((place + len(switch.text) - 1, switch.phase))
            place = text.find(switch.text, place + 1)
    phases = []
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        passed = [phase for end, phase in sorted(borders) if end < max(stop, start + 1)]
        phases.append(passed[-1] if passed else 0)
    lines = [text[start:stop].endswith("\n") for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {
        "thought": [phase == 1 for phase in phases],
        "answer": [phase == 2 for phase in phases],
        "step_end:line": [phase == 1 and line for phase, line in zip(phases, lines, strict=True)],
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tags", [tuple(TAGS), ()], ids=["tags are tokens", "tags are bytes"])
@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=4), pad=st.integers(0, 3))
def test_scopes_follow_every_format(name: str, tags: tuple[str, ...], cuts: list[int], pad: int) -> None:
    fmt = FORMATS[name]
    tokenizer = tokenizer_of(name, tags)
    text = "Q: 2?\n" + fmt.write("so\nit is\n4", "4\nyes") + "\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    tracker, cache = PositionTracker(SCOPES, special_tokens(tokenizer)), FakeCache()
    got: dict[str, list[bool]] = {scope: [] for scope in SCOPES}
    places = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, stop in itertools.pairwise(places):
        padding = pad if start == 0 else 0  # on the left, in the first forward
        piece = torch.tensor([[0] * padding + ids[start:stop]])
        mask = torch.tensor([[0] * pad + [1] * stop])
        tracker.before({"input_ids": piece, "attention_mask": mask, "past_key_values": cache})
        for scope in SCOPES:
            mask_T = tracker.mask(scope)
            assert mask_T is not None
            got[scope] += mask_T.tolist()[padding:]
        tracker.after({"past_key_values": cache}, None)
        cache.length += piece.shape[1]
    assert got == expected(name, text, starts)


def test_a_model_that_does_not_think() -> None:
    tokenizer = byte_tokenizer([], "{{ messages[0].content }}")
    assert token_tags(tokenizer) is None
    special = special_tokens(tokenizer)
    for scope in ("thought", "answer"):
        with pytest.raises(ValueError, match=f"scope '{scope}': this model does not think.*--thinking"):
            PositionTracker([scope], special)
    tracker, cache = PositionTracker(["step_end:line"], special), FakeCache()
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Q\n\n", "a\nb\n"))
    call = {"input_ids": torch.tensor([prompt]), "attention_mask": None, "past_key_values": cache}
    tracker.before(call)
    mask_T = tracker.mask("step_end:line")
    assert mask_T is not None
    assert not mask_T.any(), "no step of the response ends in its prompt"
    tracker.after(call, None)
    cache.length += len(prompt)
    tracker.before({"input_ids": torch.tensor([response]), "attention_mask": None, "past_key_values": cache})
    mask_T = tracker.mask("step_end:line")
    assert mask_T is not None
    assert mask_T.tolist() == [False, True, False, True]
