"""Prompts of the arms no-thinking, thinking-off and effort, on the published chat templates."""

from __future__ import annotations

import pytest

from launch.core.prompt_options import PromptOptions, ask_prompts
from moe_steer.thinking import thinking_format, thinking_off
from moe_steer.thinking.templates import effort_name, render
from published_templates import NAMES, byte_tokenizer, published
from reasoning_evals.prompts import (
    FINISHED,
    prompt_with_effort,
    prompt_with_empty_thought,
    prompt_without_thinking,
    render_prompt,
)

QUESTION = "What is 40 + 2?"
TURN = [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("name", NAMES)
def test_each_template_is_followed_or_refused(name: str) -> None:
    tokenizer = published(name)
    try:
        plain = render_prompt(tokenizer, QUESTION).text
    except ValueError:
        return
    fmt = thinking_format(tokenizer)
    headed = fmt.split("42", opened=False).answer != "42"
    if fmt.thinks and fmt.asked and headed:
        with pytest.raises(ValueError, match="does not begin with a header of its own is no answer"):
            prompt_with_empty_thought(tokenizer)
    elif fmt.thinks and fmt.asked:
        empty = prompt_with_empty_thought(tokenizer)(QUESTION).text
        assert empty.startswith(plain.rstrip())
        written = empty[len(plain) :] if empty.startswith(plain) else empty[len(plain.rstrip()) :]
        assert FINISHED in written
        found = fmt.split(f"{written}42", opened=fmt.opened)
        assert (found.state, found.thought.strip(), found.answer.strip()) == ("closed", FINISHED, "42")
    else:
        with pytest.raises(ValueError, match="needs a model that thinks"):
            prompt_with_empty_thought(tokenizer)
    off = thinking_off(tokenizer)
    if off:
        assert prompt_without_thinking(tokenizer)(QUESTION).text == render(tokenizer, TURN, **off) != plain
    else:
        with pytest.raises(ValueError, match="has no switch that turns thinking off"):
            prompt_without_thinking(tokenizer)
    argument = effort_name(tokenizer)
    if argument is None:
        with pytest.raises(ValueError, match="this chat template reads none of"):
            prompt_with_effort(tokenizer, "low")
    else:
        asked = {**dict(fmt.arguments), argument: "low"}
        if render(tokenizer, TURN, **asked) + fmt.append == plain:
            with pytest.raises(ValueError, match="takes no notice of the effort 'low'"):
                prompt_with_effort(tokenizer, "low")
        else:
            assert prompt_with_effort(tokenizer, "low")(QUESTION).text == render(tokenizer, TURN, **asked) + fmt.append
    assert render_prompt(tokenizer, QUESTION).text == plain, "the other arms are asked as before"


GLM = (
    "{% set effort = reasoning_effort if reasoning_effort in ['low', 'high'] else 'max' %}Reasoning effort: {{ effort }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
"""As in GLM-5.3: any other word is the default, without a complaint."""


def test_an_effort_is_followed_or_is_the_default_by_name_or_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(template=GLM)
    plain = render_prompt(tokenizer, QUESTION).text
    assert "effort: low" in prompt_with_effort(tokenizer, "low")(QUESTION).text
    assert prompt_with_effort(tokenizer, "max")(QUESTION).text == plain
    with pytest.raises(ValueError, match="takes no notice of the effort 'hihg'"):
        prompt_with_effort(tokenizer, "hihg")
    ask_prompts(tokenizer, PromptOptions(effort="high"), quiet=True)
    assert "effort: high" in render_prompt(tokenizer, QUESTION).text
    assert "effort: high" in prompt_with_effort(tokenizer, "high")(QUESTION).text
    assert capsys.readouterr().err == ""
    other = byte_tokenizer(template=GLM)
    ask_prompts(other, PromptOptions(effort="hihg"))
    assert render_prompt(other, QUESTION).text == plain
    note = "NOTE: the chat template takes no notice of the effort 'hihg': the prompt is the one without it\n"
    assert capsys.readouterr().err == note
    ask_prompts(other, PromptOptions(effort="hihg"), quiet=True)
    with pytest.raises(ValueError, match="reads none of"):
        ask_prompts(byte_tokenizer(template=BARE), PromptOptions(effort="high"))
    assert capsys.readouterr().err == ""


SILENT = (
    "{% if reasoning_effort is defined and reasoning_effort == 'max' %}Think hard.{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
"""As in DeepSeek-V4: nothing is written for its own default, which is high."""
BARE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def test_a_default_that_is_written_nowhere_is_taken_and_is_no_arm(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(template=SILENT)
    plain = render_prompt(tokenizer, QUESTION).text
    with pytest.raises(ValueError, match="takes no notice of the effort 'high'"):
        prompt_with_effort(tokenizer, "high")
    assert "Think hard." in prompt_with_effort(tokenizer, "max")(QUESTION).text
    ask_prompts(tokenizer, PromptOptions(effort="high"))
    assert render_prompt(tokenizer, QUESTION).text == plain
    assert capsys.readouterr().err.startswith("NOTE: the chat template takes no notice of the effort 'high': ")
