"""Soft budgets and reminders against loops over rows and tokens; in every format; and the reading of what leaks behind a cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_steer.thinking import FORMATS, token_tags
from published_templates import TAGS as TAG_TEXTS
from published_templates import byte_tokenizer
from reasoning_evals.decoding import Reminder, SoftBudget, ThinkingBudget
from test_decoding import LONG_TAGS, OPEN, TAGS, VOCABULARY, ends_at, logits, padded, rows, tags, thought_start

STEP_ENDS = (3, 4)


def naive_soft(row: list[int], scores: list[float], rule: SoftBudget) -> list[float]:
    start = thought_start(row, rule.tags)
    close = rule.tags.close
    begun = max(n for n in range(len(close)) if ends_at(row, close[:n], len(row)))
    if start is None:
        return scores
    begun = min(begun, len(row) - start)
    held = len(row) - start - begun
    first = rule.num_tokens - rule.ramp
    changed = list(scores)
    if rule.ramp and held >= first:
        changed[close[begun]] += rule.peak * min(1.0, (held - first + 1) / rule.ramp)
    ends_step = len(row) > begun and row[len(row) - 1 - begun] in rule.step_ends
    if held >= rule.num_tokens and (ends_step or held >= rule.num_tokens + rule.grace):
        return [0.0 if token == close[begun] else -math.inf for token in range(len(scores))]
    return changed


@settings(deadline=None, max_examples=150)
@given(found=rows, both=tags, budget=st.integers(0, 12), ramp=st.integers(0, 12), grace=st.integers(0, 5))
def test_a_soft_budget_equals_its_definition(found, both, budget, ramp, grace) -> None:  # type: ignore[no-untyped-def]
    rule = SoftBudget(num_tokens=budget, tags=both, ramp=min(ramp, budget), grace=grace, peak=2.5, step_ends=STEP_ENDS)
    scores = logits(len(found))
    got = rule(padded(found), scores)
    expected = torch.tensor([naive_soft(row, score.tolist(), rule) for row, score in zip(found, scores, strict=True)])
    assert torch.allclose(got, expected, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(found=rows, both=tags, budget=st.integers(0, 12))
def test_without_ramp_and_grace_it_is_the_hard_budget(found, both, budget) -> None:  # type: ignore[no-untyped-def]
    soft = SoftBudget(num_tokens=budget, tags=both, ramp=0, grace=0, peak=9.0, step_ends=())
    hard = ThinkingBudget(num_tokens=budget, tags=both)
    scores = logits(len(found))
    assert torch.equal(soft(padded(found), scores), hard(padded(found), scores))


def written(rule: object, ids: list[int], wishes: list[int], length: int, size: int) -> list[int]:
    """What a model writes that wants these tokens in turn, each by one logit."""
    row = list(ids)
    for number in range(length):
        scores = torch.zeros(1, size)
        scores[0, wishes[number % len(wishes)]] = 1.0
        row.append(int(rule(torch.tensor([row]), scores).argmax()))  # type: ignore[operator]
    return row[len(ids) :]


def test_the_ramp_the_grace_and_the_cut_by_hand() -> None:
    soft = {"num_tokens": 6, "tags": LONG_TAGS, "step_ends": (3,)}
    start = [4, 6, 7]
    # A model that wants 5 by one logit: the ramp of four (.5, 1, 1.5, 2) outbids it at the third token of the ramp.
    pushed = written(SoftBudget(**soft, ramp=4, grace=2, peak=2.0), start, [5], 9, VOCABULARY)
    assert pushed == [5, 5, 5, 5, 6, 8, 9, 5, 5]
    # No ramp, and a step that ends two tokens behind the budget: the grace lasts until there.
    ended = written(SoftBudget(**soft, ramp=0, grace=4, peak=2.0), start, [5, 5, 5, 5, 5, 5, 5, 3], 12, VOCABULARY)
    assert ended == [5, 5, 5, 5, 5, 5, 5, 3, 6, 8, 9, 5]
    # No step ends: the cut comes at the end of the grace.
    cut = written(SoftBudget(**soft, ramp=0, grace=4, peak=2.0), start, [5], 13, VOCABULARY)
    assert cut == [5] * 10 + [6, 8, 9]


def test_a_reminder_is_written_once_in_a_thought() -> None:
    rule = Reminder(after=2, text=(8, 9, 10), tags=TAGS)
    assert written(rule, [4, OPEN, 7], [5], 6, VOCABULARY) == [5, 8, 9, 10, 5, 5]
    assert written(rule, [4, 7], [5], 4, VOCABULARY) == [5, 5, 5, 5], "no thought is open"


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.thinks])
@pytest.mark.parametrize("texts", [TAG_TEXTS, []], ids=["tags are tokens", "tags are bytes"])
def test_the_grace_ends_the_thought_in_every_format(name: str, texts: list[str]) -> None:
    fmt, tokenizer = FORMATS[name], byte_tokenizer(texts)
    forms = token_tags(tokenizer, fmt)
    assert forms is not None
    letter, stop = tokenizer("x.", add_special_tokens=False)["input_ids"]
    ids = tokenizer(f"Q {fmt.open.strip()}", add_special_tokens=False)["input_ids"]
    rule = SoftBudget(num_tokens=5, tags=forms, ramp=0, grace=4, peak=1.0, step_ends=(stop,))
    told = tokenizer.decode(written(rule, ids, [letter] * 6 + [stop] + [letter] * 60, 60, len(tokenizer)))
    assert told.startswith("xxxxxx.")
    assert fmt.split(told, opened=True).thought == "xxxxxx."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ramp": 7}, "give a ramp from 0 to the budget, 6"),
        ({"grace": -1}, "a grace of 0 or more"),
        ({"peak": math.inf}, "give a number of logits"),
        ({"num_tokens": -1, "ramp": 0}, "the thinking budget is -1 tokens"),
    ],
)
def test_wrong_settings_are_refused(given: dict, message: str) -> None:
    right = {"num_tokens": 6, "tags": TAGS, "ramp": 2, "grace": 1, "peak": 3.0, "step_ends": (3,)}
    with pytest.raises(ValueError, match=message):
        SoftBudget(**right | given)
    with pytest.raises(ValueError, match="give 1 or more"):
        Reminder(after=0, text=(5,), tags=TAGS)
