"""The classes of tokens, by hand and on the lab's tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_steer.thinking import TokenTags
from moe_steer.tokens.positions import PositionTracker
from moe_steer.tokens.scopes import SpecialTokens, special_tokens
from moe_steer.tokens.steps import (
    ANY_STOP,
    BLANK_LINE,
    CAPITAL,
    DIGIT_LAST,
    ELLIPSIS,
    FORMULA,
    LETTER,
    LETTER_LAST,
    LINE,
    MARKUP,
    NAME,
    NUMBER,
    ONLY_SPACE,
    SENTENCE,
    SHORT,
    SPACE_FIRST,
    STOP,
    token_class,
)

TAGS = TokenTags.of_pair((1,), (2,))


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("", 0),
        (" word", 0),
        (",", 0),
        (")", 0),
        ("**", 0),
        (":", 0),
        (".", STOP),
        ("...", STOP),
        ("so.", SENTENCE),
        ("approx.", 0),
        (".$", SENTENCE),
        (".}", SENTENCE),
        (".\\)", SENTENCE),
        ("\\!", 0),
        (" really?", SENTENCE),
        ("! ", SENTENCE),
        ('."', SENTENCE),
        (".)", SENTENCE),
        (".**", SENTENCE),
        ("\u3002", SENTENCE),
        ("\uff1f\n", SENTENCE | LINE),
        (".\n", SENTENCE | LINE),
        (".\n\n", SENTENCE | LINE | BLANK_LINE),
        (".\n  \n", SENTENCE | LINE | BLANK_LINE),
        ("}\n", LINE),
        (":\n\n", LINE | BLANK_LINE),
        ("\n", LINE | ONLY_SPACE),
        ("\r\n", LINE | ONLY_SPACE),
        ("\n    ", LINE | ONLY_SPACE),
        ("\n\n", LINE | BLANK_LINE | ONLY_SPACE),
        ("\r\n\r\n", LINE | BLANK_LINE | ONLY_SPACE),
        ("  ", ONLY_SPACE),
        ("\nWait", 0),
        ("a\n\nb\n", LINE),
    ],
)
def test_classes_by_hand(text: str, bits: int) -> None:
    assert token_class(text) & (SENTENCE | LINE | BLANK_LINE | ONLY_SPACE | STOP) == bits


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("3", DIGIT_LAST | NUMBER | FORMULA), (" 12", DIGIT_LAST | NUMBER | FORMULA | SPACE_FIRST), ("x2", DIGIT_LAST | FORMULA),
        ("x", LETTER), (" B", LETTER | CAPITAL | NAME | SPACE_FIRST), ("B.", CAPITAL), ("(a", LETTER), ("(A", LETTER | CAPITAL),
        ("approx", SHORT), (" Dr", SHORT | NAME | SPACE_FIRST), ("dr", 0), (".e", SHORT), ("- ", MARKUP),
        ("**", MARKUP | FORMULA), ("...", ELLIPSIS), (" Then", SPACE_FIRST), (" Subst", SPACE_FIRST), (" von", SPACE_FIRST | NAME),
        (" x", SPACE_FIRST | LETTER), (" =", SPACE_FIRST | FORMULA), ("Bohr", 0), ("\nBohr", SPACE_FIRST),
    ],
)  # fmt: skip
def test_what_the_next_tokens_need_to_know(text: str, bits: int) -> None:
    rest = SENTENCE | LINE | BLANK_LINE | ONLY_SPACE | STOP | ANY_STOP | LETTER_LAST
    assert token_class(text) & ~rest == bits


@given(text=st.text(alphabet="a.\n \t)", max_size=8))
def test_a_blank_line_is_two_line_ends_with_nothing_between(text: str) -> None:
    lines = text.split("\n")
    ends_line = len(lines) > 1 and not lines[-1].strip()
    ends_blank = ends_line and len(lines) > 2 and not lines[-2].strip()
    assert bool(token_class(text) & LINE) == ends_line
    assert bool(token_class(text) & BLANK_LINE) == ends_blank


def test_the_lab_tokenizer() -> None:
    from transformers import AutoTokenizer

    from moe_steer.lab import LAB_MODEL

    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    special = special_tokens(tokenizer)
    ids = [i for i, bits in enumerate(special.classes) if bits & (SENTENCE | STOP | LINE)]
    ends = {tokenizer.decode([i]).strip(" ") for i in ids}
    assert {".", "?", "!", "\n"} <= ends
    assert all(text.strip()[-1:] in (".", "?", "!", "") for text in ends), "no other token ends a step"
    assert special.can_end({"paragraph"})


def test_a_class_that_no_token_can_end_is_refused() -> None:
    words = SpecialTokens(tags=TAGS, classes=(0, 0, 0, SENTENCE))
    PositionTracker({"step_end", "step_end:sentence"}, words)
    with pytest.raises(
        ValueError, match="'step_end:paragraph': no token of this tokenizer ends a paragraph, use another"
    ):
        PositionTracker({"step_end:paragraph"}, words)
    one_by_one = SpecialTokens(tags=TAGS, classes=(LINE | ONLY_SPACE,))
    PositionTracker({"step_end:paragraph"}, one_by_one)  # two line ends in a row
