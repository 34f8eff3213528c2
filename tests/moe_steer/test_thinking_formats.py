"""Thinking formats: laws over all published chat templates, over all known formats, and over templates made for one question."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_steer.thinking import (
    FORMATS,
    PromptSettings,
    ThinkingFormat,
    named,
    read_from_text,
    thinking_format,
    token_tags,
    use_prompt_settings,
)
from published_templates import NAMES, NOT_THINKING, OF_TOOLS, TAGS, byte_tokenizer, needs_templates, published
from reasoning_evals import grade, render_prompt
from reasoning_evals.problems import Problem

QUESTION = "What is 2 + 2?"
CASES = Path(__file__).parents[3] / "shared" / "cases" / "reports"
WORDS = st.text(alphabet="ab \n.4{}\\", max_size=30).filter(lambda text: text == text.strip())
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def own_outputs(tokenizer: Any) -> set[str]:
    """Everything that a template writes for the question, under every combination of its usual switches."""
    found = set()
    values = {"enable_thinking": (None, True, False), "thinking": (None, True, False)}
    for combination in itertools.product(*values.values()):
        arguments = {name: value for name, value in zip(values, combination, strict=True) if value is not None}
        for tools in (None, []):
            try:
                turn = [{"role": "user", "content": QUESTION}]
                found.add(
                    tokenizer.apply_chat_template(
                        turn, tokenize=False, add_generation_prompt=True, tools=tools, **arguments
                    )
                )
            except Exception:
                continue
    return found


@needs_templates
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_templates_own(name: str) -> None:
    tokenizer = published(name)
    outputs = own_outputs(tokenizer)
    if not outputs:
        assert name in OF_TOOLS
        with pytest.raises(ValueError, match="cannot be rendered.*--template-arg") as refusal:
            render_prompt(tokenizer, QUESTION)
        assert "\n" not in str(refusal.value)
        return
    prompt = render_prompt(tokenizer, QUESTION)
    assert prompt.text in outputs
    assert list(prompt.token_ids) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    fmt = thinking_format(tokenizer)
    assert (fmt.name == "none") == (name in NOT_THINKING)
    assert fmt.append == ""
    if fmt.thinks:
        closed = [switch.text for switch in fmt.switches if switch.closes]
        assert not any(prompt.text.rstrip().endswith(text) for text in closed), "thinking must be on"
        assert fmt.asked


@needs_templates
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_TOOLS])
@settings(max_examples=8, deadline=None)
@given(thought=WORDS.filter(bool), answer=WORDS)
def test_split_is_the_inverse_of_write(name: str, thought: str, answer: str) -> None:
    tokenizer = published(name)
    fmt, prompt = thinking_format(tokenizer), render_prompt(tokenizer, QUESTION).text
    text = fmt.write(thought, answer)
    if not fmt.thinks:
        assert fmt.split(text, prompt=prompt) == ("none", "", answer)
        return
    assert fmt.split(text, prompt=prompt) == ("closed", thought, answer)
    end = text.index(thought) + len(thought) if fmt.opened else len(fmt.open) + len(thought)
    for cut in range(1 if fmt.opened else len(fmt.open), end + 1):
        assert fmt.split(text[:cut], prompt=prompt)[::2] == ("truncated", "")
    assert grade(Problem("p", "?", "4", "integer"), text[:end], opened=fmt.opened).outcome in ("truncated", "no_answer")


@pytest.mark.parametrize("fmt", [item for item in FORMATS.values() if item.thinks], ids=lambda item: item.name)
@pytest.mark.parametrize("opened", [False, True])
@settings(max_examples=15, deadline=None)
@given(thought=WORDS, answer=WORDS)
def test_known_formats_read_what_they_write(fmt: ThinkingFormat, opened: bool, thought: str, answer: str) -> None:
    fmt = dataclasses.replace(fmt, opened=opened)
    text = fmt.write(thought, answer)
    assert fmt.split(text) == ("closed" if thought else "empty", thought, answer)
    assert ThinkingFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt
    if not opened:
        assert read_from_text(text).split(text) == fmt.split(text), "known from its text alone"


@pytest.mark.parametrize("fmt", [item for item in FORMATS.values() if item.thinks], ids=lambda item: item.name)
def test_tokens_are_counted_as_the_text_is_split(fmt: ThinkingFormat) -> None:
    from reasoning_evals.thinking import count_tokens

    for tags in (TAGS, []):
        tokenizer = byte_tokenizer(tags)
        text = fmt.write("ab cd", "4 4 4")
        forms = token_tags(tokenizer, fmt)
        assert forms is not None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = count_tokens(ids, False, forms, stopped=False)
        blanks = [part.count("\n") for part in (fmt.open, fmt.close, fmt.end)]
        assert len("ab cd") <= counts.thinking <= len("ab cd") + blanks[0] + blanks[1]
        assert len("4 4 4") <= counts.answer <= len("4 4 4") + blanks[1] + blanks[2]


def test_tags_that_nobody_named_are_read_from_the_template() -> None:
    history = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<ponder level='3'>{{ m.reasoning_content }}"
        "</ponder>\n{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fmt = thinking_format(byte_tokenizer(template=history))
    assert (fmt.name, fmt.opened) == ("<ponder level='3'>...</ponder>", False)
    assert fmt.split("<ponder level='9'>hm</ponder>\n4") == ("closed", "hm", "4")
    assert fmt.split(fmt.write("hm", "4")) == ("closed", "hm", "4")
    opened = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</muse>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if deep_thinking %}<muse>\n{% endif %}{% endif %}"
    )
    fmt = thinking_format(byte_tokenizer(template=opened))
    assert (fmt.name, fmt.opened, dict(fmt.arguments)) == ("<muse>...</muse>", True, {"deep_thinking": True})
    assert fmt.split("hm</muse>4") == ("closed", "hm", "4")
    assert named("<a>...</a>").split("<a>x</a>4") == ("closed", "x", "4")


def test_harmony_commentary_and_tool_calls_are_neither() -> None:
    harmony = FORMATS["harmony"]
    text = (
        "<|channel|>analysis<|message|>look<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
        '<|message|>{"x": 9}<|call|><|start|>assistant<|channel|>analysis<|message|>more<|end|>'
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    assert harmony.split(text) == ("closed", "lookmore", "4")
    assert harmony.split("<|channel|>final<|message|>4") == ("none", "", "4")
    assert FORMATS["think"].split("<think>a</think><tool_call>{5}</tool_call>\n4") == ("closed", "a", "4")
    assert FORMATS["think"].split("<think>say <tool_call> and stop</think>4") == (
        "closed",
        "say <tool_call> and stop",
        "4",
    )


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")
@pytest.mark.parametrize("extra", [[], TAGS], ids=["own tokens", "every tag a token"])
def test_templates_of_the_reports(extra: list[str]) -> None:
    for case in json.loads((CASES / "prompts.json").read_text()):
        tokenizer = byte_tokenizer([*case["tokens"], *extra], case["template"])
        text = render_prompt(tokenizer, QUESTION).text
        if case["name"].startswith("Qwen3") and extra:
            continue  # with every tag a token, a bare template says nothing of which are the model's
        assert not any(never in text for never in case["never"]), case["name"]
        assert case["ends"] is None or any(text.endswith(end) for end in case["ends"]), case["name"]


def test_a_bare_template_leaves_it_to_the_tokenizer() -> None:
    with_tags, without = byte_tokenizer(["<think>", "</think>"], CHATML), byte_tokenizer([], CHATML)
    assert render_prompt(with_tags, "Q").text.endswith("<|im_start|>assistant\n<think>\n")
    assert thinking_format(without).name == "none"
    assert render_prompt(without, "Q").text.endswith("<|im_start|>assistant\n")
    roles = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    assert thinking_format(byte_tokenizer(["<think>", "</think>"], roles)).name == "none", (
        "its author says: no thoughts"
    )
    assert thinking_format(byte_tokenizer(["<think>", "</think>"])).name == "think", "a base model without template"


@needs_templates
def test_what_the_user_asks_of_prompts() -> None:
    tokenizer = published("Qwen-Qwen3-0.6B")
    asked = PromptSettings(no_thinking=True, system="Be brief.")
    use_prompt_settings(tokenizer, asked)
    prompt, fmt = render_prompt(tokenizer, QUESTION).text, thinking_format(tokenizer)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert (fmt.asked, fmt.split("4", prompt=prompt)) == (False, ("none", "", "4"))
    assert "switched off; template arguments enable_thinking=False" in fmt.describe()
    use_prompt_settings(tokenizer, PromptSettings(arguments={"enable_thinking": False}))
    assert not thinking_format(tokenizer).asked
    use_prompt_settings(tokenizer, PromptSettings())
    with pytest.raises(
        ValueError, match="--template-arg colour: this chat template does not read it; it reads .*enable_thinking"
    ):
        use_prompt_settings(tokenizer, PromptSettings(arguments={"colour": 1}))
    with pytest.raises(ValueError, match="--effort 'high': this chat template reads none of reasoning_effort"):
        use_prompt_settings(tokenizer, PromptSettings(effort="high"))
    harmony = published("openai-gpt-oss-120b")
    use_prompt_settings(harmony, PromptSettings(effort="high"))
    assert "Reasoning: high" in render_prompt(harmony, QUESTION).text
    use_prompt_settings(harmony, PromptSettings())
    r1 = published("llama-cpp-deepseek-r1")
    use_prompt_settings(r1, PromptSettings(no_thinking=True))
    with pytest.raises(ValueError, match="--no-thinking: this chat template has no switch"):
        thinking_format(r1)
    use_prompt_settings(r1, PromptSettings(thinking="begin-of-thought"))
    assert thinking_format(r1).name == "begin-of-thought"
    use_prompt_settings(r1, PromptSettings(thinking="nonsense"))
    with pytest.raises(ValueError, match="'nonsense' is unknown: give one of think, harmony"):
        thinking_format(r1)
    use_prompt_settings(r1, PromptSettings())
