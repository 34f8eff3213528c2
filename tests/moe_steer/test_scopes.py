"""The words of a scope: what they mean, and that no other word passes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_steer.tokens.scopes import SCOPES, STEP_CLASSES, Scope, parse_scope


def test_forms() -> None:
    for kind in SCOPES:
        assert parse_scope(kind).kind == kind
    assert parse_scope("step_end") == parse_scope("step_end:line+sentence")
    assert parse_scope("step_end:sentence+paragraph").classes == {"sentence", "paragraph"}
    assert parse_scope("after:0") == Scope(kind="after", skip=0)
    assert parse_scope("after:2048").skip == 2048


@given(
    text=st.one_of(
        st.text(max_size=20),
        st.from_regex(r"(step_end|after|thought)(:[a-z0-9+]{0,9})?", fullmatch=True),
        st.lists(st.sampled_from(STEP_CLASSES), max_size=4).map(lambda names: "step_end:" + "+".join(names)),
    )
)
def test_a_text_is_a_scope_or_an_error_of_one_line(text: str) -> None:
    legal = text in SCOPES or re.fullmatch(r"after:(0|[1-9][0-9]*)", text)
    if text.startswith("step_end:"):
        names = text[len("step_end:") :].split("+")
        legal = bool(names) and set(names) <= set(STEP_CLASSES) and len(set(names)) == len(names)
    if legal:
        parse_scope(text)
    else:
        with pytest.raises(ValueError, match="scope ") as caught:
            parse_scope(text)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mind", "scope 'mind' is unknown: choose one of all, prompt, thought, answer, generated, step_end, step_end:CLASS"),
        ("after", "does not say after how many generated tokens: write after:N, for example after:64"),
        ("after:-1", "write after:N"),
        ("after:07", "write after:N"),
        ("after:\u0663", "write after:N"),
        ("thought:3", "thought takes no parameter, write 'thought'; only step_end and after take one"),
        ("all:", "all takes no parameter"),
        ("step_end:", "names the class '': step_end takes sentence, line, paragraph, stop, joined by +"),
        ("step_end:word+line", "names the class 'word'"),
        ("step_end:line+line", "names a class twice: name each once"),
        (None, "scope None is NoneType: give one of"),
        (["all"], "is list: give one of"),
    ],
)  # fmt: skip
def test_what_each_refusal_says(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scope(text)
