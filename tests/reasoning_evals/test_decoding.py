"""The decoding rules against loops over rows and tokens that are read off the papers."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from moe_steer.thinking import FORMATS, TokenTags, token_tags
from published_templates import TAGS as TAG_TEXTS
from published_templates import byte_tokenizer
from reasoning_evals.decoding import (
    Ban,
    Continuation,
    SwitchPenalty,
    ThinkingBudget,
)
from reasoning_evals.decoding.forms import completed_by, last_end, last_start

PAD, OPEN, CLOSE = 0, 1, 2
TAGS = TokenTags.of_pair((OPEN,), (CLOSE,))
LONG_TAGS = TokenTags.of_pair((6, 7), (6, 8, 9))
VOCABULARY = 12

ids_of_a_row = st.lists(st.integers(1, VOCABULARY - 1), min_size=0, max_size=24)
rows = st.lists(ids_of_a_row, min_size=1, max_size=5)
some_forms = st.lists(
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
).map(tuple)
tags = st.sampled_from([TAGS, LONG_TAGS])


def padded(found: list[list[int]]) -> torch.Tensor:
    """Left-padded, at least one column."""
    width = max(1, *(len(row) for row in found))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in found])


def logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def ends_at(row: list[int], form: tuple[int, ...], stop: int) -> bool:
    return stop >= len(form) and tuple(row[stop - len(form) : stop]) == form


def thought_start(row: list[int], both: TokenTags) -> int | None:
    """Read from left to right: where the thought that is open at the end of the row started."""
    start = None
    for stop in range(len(row) + 1):
        if ends_at(row, both.close, stop):
            start = None
        if ends_at(row, both.opening[0], stop):
            start = stop
    return start


def naive_targets(row: list[int], forms: tuple[tuple[int, ...], ...]) -> set[int]:
    return {form[-1] for form in forms if ends_at(row, form[:-1], len(row))}


def naive_penalty(row: list[int], scores: list[float], rule: SwitchPenalty) -> list[float]:
    start = thought_start(row, rule.tags)
    if start is None:
        return scores
    if rule.restarts:
        for place in range(start, len(row)):
            if any(tuple(row[place : place + len(form)]) == form for form in rule.forms):
                start = place
    if len(row) >= start + rule.beta:
        return scores
    targets = naive_targets(row, rule.forms)
    return [score - rule.alpha if token in targets else score for token, score in enumerate(scores)]


def naive_budget(row: list[int], scores: list[float], rule: ThinkingBudget) -> list[float]:
    start = thought_start(row, rule.tags)
    if start is None:
        return scores
    close = rule.tags.close
    begun = max(n for n in range(len(close)) if ends_at(row[start:], close[:n], len(row) - start))
    if len(row) - start - begun < rule.num_tokens:
        return scores
    return [0.0 if token == close[begun] else -math.inf for token in range(len(scores))]


@settings(deadline=None, max_examples=150)
@given(rows, some_forms, tags, st.integers(1, 12), st.booleans())
def test_penalty_equals_the_loop(
    found: list[list[int]], forms: tuple[tuple[int, ...], ...], both: TokenTags, beta: int, restarts: bool
) -> None:
    rule = SwitchPenalty(forms=forms, tags=both, alpha=2.5, beta=beta, restarts=restarts)
    scores = logits(len(found))
    before = scores.clone()
    wanted = [naive_penalty(row, scores[i].tolist(), rule) for i, row in enumerate(found)]
    torch.testing.assert_close(rule(padded(found), scores), torch.tensor(wanted), rtol=0, atol=1e-6)
    assert torch.equal(scores, before), "the model's logits are left as they are"


@settings(deadline=None, max_examples=100)
@given(rows, some_forms)
def test_ban_equals_the_loop(found: list[list[int]], forms: tuple[tuple[int, ...], ...]) -> None:
    scores = logits(len(found))
    wanted = scores.clone()
    for i, row in enumerate(found):
        wanted[i, list(naive_targets(row, forms))] = -math.inf
    assert torch.equal(Ban(forms=forms)(padded(found), scores), wanted)


@settings(deadline=None, max_examples=150)
@given(rows, tags, st.integers(0, 8))
def test_budget_equals_the_loop(found: list[list[int]], both: TokenTags, num_tokens: int) -> None:
    rule = ThinkingBudget(num_tokens=num_tokens, tags=both)
    scores = logits(len(found))
    wanted = [naive_budget(row, scores[i].tolist(), rule) for i, row in enumerate(found)]
    assert torch.equal(rule(padded(found), scores), torch.tensor(wanted))


@settings(deadline=None, max_examples=100)
@given(rows, st.integers(1, 12), st.lists(st.integers(1, VOCABULARY - 1), min_size=5, max_size=5))
def test_continuation_equals_the_loop(found: list[list[int]], num_tokens: int, drawn: list[int]) -> None:
    rule, written = Continuation(num_tokens=num_tokens, word=(5,), tags=TAGS), drawn[: len(found)]
    expected = []
    for row, token in zip(found, written, strict=True):
        start = thought_start(row, TAGS)
        early = start is not None and len(row) - start < num_tokens
        expected.append(5 if early and token == CLOSE else token)
    assert rule.redirect(padded(found), torch.tensor(written)).tolist() == expected
    scores = logits(len(found))
    assert rule(padded(found), scores) is scores


@settings(deadline=None, max_examples=50)
@given(rows, some_forms, tags, st.randoms(use_true_random=False))
def test_rows_can_be_dropped_and_moved(
    found: list[list[int]], forms: tuple[tuple[int, ...], ...], both: TokenTags, random: object
) -> None:
    rules = LogitsProcessorList(
        [
            SwitchPenalty(forms=forms, tags=both, beta=6),
            Ban(forms=forms[:1]),
            ThinkingBudget(num_tokens=5, tags=both),
        ]
    )
    ids_BT, scores = padded(found), logits(len(found))
    together = rules(ids_BT, scores)
    keep = sorted(range(len(found)), key=lambda _: random.random())[: max(1, len(found) - 1)]  # type: ignore[attr-defined]
    assert torch.equal(rules(ids_BT[keep], scores[keep]), together[keep])


def test_the_window_by_hand() -> None:
    """beta 3: the first three tokens of a thought are penalised; a switch starts another thought."""
    rule = SwitchPenalty(forms=((5,), (7, 8)), tags=TAGS, alpha=3.0, beta=3)
    row = [4, OPEN, 9, 9, 9, 5, 9, 9, 9, 7, 8, 9, CLOSE, 9]
    lowered = {5: [], 8: []}  # type: dict[int, list[int]]
    for position in range(1, len(row) + 1):
        change = rule(torch.tensor([row[:position]]), torch.zeros(1, VOCABULARY))[0]
        for token in lowered:
            if change[token] == -3.0:
                lowered[token].append(position)
        assert set(change.tolist()) <= {0.0, -3.0}
    # <think> at 1, so thoughts start at 2 (after it), 5 (the switch 5) and 9 (the switch 7 8).
    assert lowered[5] == [2, 3, 4, 6, 7, 11]
    assert lowered[8] == [], "7 at 9 began a form, but the window of the thought at 5 had ended"
    assert 8 in naive_targets(row[:10], rule.forms)


def test_penalty_on_the_closing_tag_keeps_the_thought_open_for_beta_tokens() -> None:
    rule = SwitchPenalty(forms=((CLOSE,),), tags=TAGS, alpha=3.0, beta=2)
    lowered = [
        rule(torch.tensor([[4, OPEN, 9, 9, 9][: 2 + t]]), torch.zeros(1, VOCABULARY))[0, CLOSE].item() for t in range(4)
    ]
    assert lowered == [-3.0, -3.0, 0.0, 0.0]


def test_a_form_inside_another_is_lowered_once() -> None:
    rule = SwitchPenalty(forms=((5,), (9, 5)), tags=TAGS)
    assert rule(torch.tensor([[OPEN, 9]]), torch.zeros(1, VOCABULARY))[0, 5] == -3.0


def test_budget_counts_from_the_tag_in_the_prompt_and_writes_a_long_tag_to_its_end() -> None:
    rule = ThinkingBudget(num_tokens=2, tags=LONG_TAGS)
    row = [4, 6, 7, 3]  # the prompt: the thought is open and holds one token
    for _ in range(6):
        row.append(int(rule(torch.tensor([row]), torch.nn.functional.one_hot(torch.tensor([5]), 12).float()).argmax()))
    assert row[4:] == [5, 6, 8, 9, 5, 5]


def test_settings_are_plain_values() -> None:
    for rule in (
        SwitchPenalty(forms=((5,), (7, 8)), tags=TAGS),
        Ban(forms=((5,),)),
        ThinkingBudget(num_tokens=3, tags=TAGS),
    ):
        assert json.loads(json.dumps(rule.describe()))["rule"]
    assert SwitchPenalty(forms=((8, 7), (5,)), tags=TAGS) == SwitchPenalty(forms=((5,), (8, 7), (5,)), tags=TAGS)
    described = SwitchPenalty(forms=((5,),), tags=TAGS).describe()
    assert (described["alpha"], described["beta"], described["restarts"]) == (3.0, 600, True)


def test_half_precision_stays_half_precision() -> None:
    scores = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16)
    for rule in (
        SwitchPenalty(forms=((5,),), tags=TAGS),
        Ban(forms=((5,),)),
        ThinkingBudget(num_tokens=0, tags=TAGS),
    ):
        assert rule(torch.tensor([[OPEN]]), scores).dtype == torch.bfloat16


def test_where_forms_stand() -> None:
    ids_BT = torch.tensor([[5, 7, 5, 6], [6, 6, 6, 6]])
    assert last_end(ids_BT, [(7, 5), (6,)]).tolist() == [4, 4]
    assert last_start(ids_BT, [(7, 5), (6, 6, 6, 6, 6)]).tolist() == [1, -1]
    tokens, would = completed_by(ids_BT, [(5, 6, 9), (4,)])
    assert (tokens.tolist(), would.tolist()) == ([4, 9], [[True, True], [True, False]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwitchPenalty(forms=(), tags=TAGS), "a switch word has the token forms"),
        (lambda: SwitchPenalty(forms=((1,),), tags=TAGS, alpha=0.0), "alpha is 0.0: give a number above 0"),
        (lambda: SwitchPenalty(forms=((1,),), tags=TAGS, beta=0), "beta is 0: give the length of the window"),
        (lambda: Ban(forms=((),)), "a banned word has the token forms"),
        (lambda: Ban(forms=((-1,),)), "give non-empty ids >= 0"),
        (lambda: ThinkingBudget(num_tokens=-1, tags=TAGS), "the thinking budget is -1 tokens"),
        (lambda: Continuation(num_tokens=0, word=(5,), tags=TAGS), "at least 0 tokens: give 1 or more"),
        (lambda: Continuation(num_tokens=9, word=(5, 6), tags=TAGS), "is 2 tokens .* name one of one token"),
        (lambda: Continuation(num_tokens=9, word=(5,), tags=LONG_TAGS), "ends with a tag of several tokens"),
        (lambda: TokenTags.of_pair((1,), (1,)), "the tags have the ids"),
        (lambda: TokenTags.of_pair((), (1,)), "give two different ones"),
        (lambda: Ban(forms=((99,),))(torch.tensor([[1]]), logits(1)), "token id 99 is beyond the 12 logits"),
    ],
)
def test_wrong_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.thinks])
@pytest.mark.parametrize("tags", [TAG_TEXTS, []], ids=["tags are tokens", "tags are bytes"])
def test_a_budget_ends_the_thought_in_every_format(name: str, tags: list[str]) -> None:
    """A model that would go on for ever writes its closing text after the budget, token by token, and is then let alone."""
    fmt, tokenizer = FORMATS[name], byte_tokenizer(tags)
    forms = token_tags(tokenizer, fmt)
    assert forms is not None
    letter = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    ids = tokenizer(f"Q {fmt.open.strip()}", add_special_tokens=False)["input_ids"]
    started = len(ids)
    rule = ThinkingBudget(num_tokens=5, tags=forms)
    scores = torch.zeros(1, len(tokenizer))
    scores[0, letter] = 1.0
    for _ in range(60):
        ids.append(int(rule(torch.tensor([ids]), scores).argmax()))
    written = tokenizer.decode(ids[started:])
    thought, _, rest = written.partition(
        fmt.close.strip().split("<|START_RESPONSE|>")[0].split("<|begin_of_solution|>")[0].strip()
    )
    assert thought == "x" * 5
    assert rest.strip("x") in ("", "<|start|>assistant<|channel|>final<|message|>")
    assert fmt.split(written, opened=True).state == "closed"
