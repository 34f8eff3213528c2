import doctest
import importlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals import split_thought
from reasoning_evals.thinking import Thought

MODULES = (
    "thinking", "thoughts.segments", "grading.records", "grading.expressions", "tasks.spec",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nfirst\n</think>\n\n4", False, ("closed", "first", "4")),
        ("first</think>4", False, ("closed", "first", "4")),
        ("first</think>4", True, ("closed", "first", "4")),
        ("<think>first</think>4", True, ("closed", "first", "4")),
        ("<think>first \\boxed{4}", False, ("truncated", "first \\boxed{4}", "")),
        ("first \\boxed{4}", True, ("truncated", "first \\boxed{4}", "")),
        ("", True, ("truncated", "", "")),
        ("4", False, ("none", "", "4")),
        ("", False, ("none", "", "")),
        (None, False, ("none", "", "")),
        (None, True, ("none", "", "")),
        ("<think>\n\n</think>\n\n4", False, ("empty", "", "4")),
        ("\n</think>4", True, ("empty", "", "4")),
        ("<think>a</think>4<think>b</think>5", False, ("closed", "ab", "45")),
        ("<think>a</think>4<think>b", False, ("truncated", "ab", "")),
        ("<think>a</think>4</think>", False, ("closed", "a", "4")),
        ("a</think>4</think>5", True, ("closed", "a", "45")),
        ("<think>a<think>b</think>4", False, ("closed", "ab", "4")),
        ("4 <think>check</think>", False, ("closed", "check", "4")),
        ("<think>a</think>", False, ("closed", "a", "")),
    ],
)
def test_split(text, opened, expected):
    assert split_thought(text, opened) == Thought(*expected)


def test_other_tags():
    assert split_thought("◁think▷a◁/think▷4") == Thought("closed", "a", "4")


pieces = st.lists(st.sampled_from(["<think>", "</think>", "a", "b ", "\\boxed{4}", "\n"]), max_size=12)


@given(pieces, st.booleans())
@settings(deadline=None, max_examples=300)
def test_laws(parts, opened):
    text = "".join(parts)
    state, thought, answer = split_thought(text, opened)
    assert state in ("closed", "truncated", "none", "empty")
    assert "think>" not in thought + answer
    if state == "truncated":
        assert answer == ""
        assert text.rfind("</think>") <= text.rfind("<think>") or opened
    if state == "none":
        assert not opened
        assert "think>" not in text
        assert answer == text.strip()
    if state == "empty":
        assert thought == ""
    if state != "truncated":  # nothing is lost but blanks and tags
        kept = "".join((thought + answer).split())
        assert sorted(kept) == sorted("".join(text.replace("<think>", "").replace("</think>", "").split()))


@given(pieces)
@settings(deadline=None, max_examples=200)
def test_an_opened_prompt_is_the_same_as_an_opening_tag(parts):
    text = "".join(parts)
    assert split_thought(text, opened=True) == split_thought("<think>" + text)


@pytest.mark.parametrize("text", ["\n", " ", "</s>", "x </s>", "<|end|> x "])
def test_a_run_of_blanks_or_stop_tokens_is_split_at_once(text):
    """A model that ended in a loop of line breaks: each was the start of a search to the end."""
    started = time.process_time()
    split = split_thought(text * 40_000 + "</s>\n")
    assert split.answer == "" or split.answer[-1] == "x"
    assert time.process_time() - started < 2


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"reasoning_evals.{module}"))
    assert result.attempted
    assert not result.failed
