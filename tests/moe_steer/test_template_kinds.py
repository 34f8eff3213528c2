"""Kinds of chat templates: what a template writes of an earlier turn is read back as it was, and its switches are found.

Each template shows one kind, as short as it can be said, and names a model whose published template is of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from moe_steer.thinking import (
    PromptSettings,
    ThinkingFormat,
    thinking_format,
    thinking_off,
    token_tags,
    use_prompt_settings,
)
from moe_steer.tokens import MarkerSet
from published_templates import NAMES, byte_tokenizer, needs_templates, published
from reasoning_evals import render_prompt
from reasoning_evals.prompts import render_messages
from reasoning_evals.thinking import count_tokens

QUESTION, THOUGHT, ANSWER = "What is 2 + 2?", "Rxrx", "Axax"
USER = {"role": "user", "content": QUESTION}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A template, what it is found to be, and texts that its models write."""

    template: str
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    opened: bool = False
    thought: str
    """A response with a thought, to its end."""
    plain: str = ANSWER
    """One without."""
    cut: str = THOUGHT
    """One that ended inside the thought."""


KINDS = {
    "the answer is a message of its own (Solar)": Kind(
        template="{% for m in messages %}{% if m.reasoning %}<|begin|>assistant<|think|>{{ m.reasoning }}<|end|>{% endif %}"
        "<|begin|>{{ m.role }}<|content|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
        "{% if reasoning_effort in ['low', 'minimal'] %}<|begin|>assistant<|think|><|end|>{% endif %}<|begin|>assistant{% endif %}",
        off={"reasoning_effort": "minimal"},
        thought="<|think|>Rxrx<|end|><|begin|>assistant<|content|>Axax<|end|>",
        plain="<|content|>Axax<|end|>",
        cut="<|think|>Rxrx",
    ),
    "messages are told apart by their recipient (Muse)": Kind(
        template="{% for m in messages %}{% if m.reasoning_content %}<|start|>assistant to=self<|message|>{{ m.reasoning_content }}"
        "<|eom|>{% endif %}<|start|>{{ m.role }}{% if m.role == 'assistant' %} to=user{% endif %}<|message|>{{ m.content }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        thought=" to=self<|message|>Rxrx<|eom|><|start|>assistant to=user<|message|>Axax<|eot|>",
        plain=" to=user<|message|>Axax<|eot|>",
        cut=" to=self<|message|>Rxrx",
    ),
    "a word in the header, one switch for on and one for off (HyperCLOVA X)": Kind(
        template="{% for m in messages %}{% if m.reasoning_content %}{{ '<|im_start|>assistant/think\n' + m.reasoning_content + '<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant{% if force_reasoning %}{{ '/think\n' }}{% elif skip_reasoning %}{{ '\n' }}{% endif %}{% endif %}",
        on={"force_reasoning": True},
        off={"skip_reasoning": True},
        opened=True,
        thought="Rxrx<|im_end|>\n<|im_start|>assistant\nAxax<|im_end|>",
        plain="<|im_end|>\n<|im_start|>assistant\nAxax<|im_end|>",
    ),
    "tags of several marks (Kimi-K3)": Kind(
        template="{% set thinking = thinking is undefined or thinking %}{% for m in messages %}<|open|>message role=\"{{ m.role }}\"<|sep|>"
        "{% if m.role == 'assistant' %}{% if thinking %}<|open|>think<|sep|>{{ m.reasoning_content }}<|close|>think<|sep|>{% endif %}"
        "<|open|>response<|sep|>{{ m.content }}<|close|>response<|sep|>{% else %}{{ m.content }}{% endif %}<|close|>message<|sep|>"
        "<|end_of_msg|>{% endfor %}{% if add_generation_prompt %}<|open|>message role=\"assistant\"<|sep|>"
        "<|open|>{{ 'think' if thinking else 'response' }}<|sep|>{% endif %}",
        off={"thinking": False},
        opened=True,
        thought="Rxrx<|close|>think<|sep|><|open|>response<|sep|>Axax<|close|>response<|sep|><|close|>message<|sep|>",
        plain="<|close|>think<|sep|><|open|>response<|sep|>Axax<|close|>response<|sep|>",
    ),
    "other marks around the answer than the format has elsewhere (Command A)": Kind(
        template="{% for m in messages %}<|TURN|>{{ m.role }}{% if m.reasoning %}<|START_THINKING|>{{ m.reasoning }}<|END_THINKING|>"
        "{% endif %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endfor %}{% if add_generation_prompt %}<|TURN|>assistant{% endif %}",
        thought="<|START_THINKING|>Rxrx<|END_THINKING|><|START_TEXT|>Axax<|END_TEXT|>",
        plain="<|START_TEXT|>Axax<|END_TEXT|>",
        cut="<|START_THINKING|>Rxrx",
    ),
    "tags around the answer too (ERNIE)": Kind(
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>"
        "\n\n<response>\n{{ m.content }}\n</response>\n{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        opened=True,
        thought="Rxrx\n</think>\n\n<response>\nAxax\n</response>\n",
        plain="\n</think>\n\n<response>\nAxax\n</response>\n",
    ),
    "the mode is a word, and chat by default (DeepSeek-V3.2's own encoder)": Kind(
        template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|Assistant|>"
        "{% if thinking_mode == 'thinking' %}<think>{% else %}</think>{% endif %}{% endif %}",
        on={"thinking_mode": "thinking"},
        opened=True,
        thought="Rxrx</think>Axax",
        plain="</think>Axax",
    ),
    "thinking is switched on by a word for the effort (Hunyuan 3)": Kind(
        template="{% set effort = reasoning_effort or 'no_think' %}{% if effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('effort') }}"
        "{% endif %}{% set tag = 'think{}'.format(':opensource') %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.reasoning_content %}<{{ tag }}>{{ m.reasoning_content }}</{{ tag }}>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><{{ tag }}>{% if effort == 'no_think' %}</{{ tag }}>{% endif %}{% endif %}",
        on={"reasoning_effort": "high"},
        opened=True,
        thought="Rxrx</think:opensource>Axax",
        plain="</think:opensource>Axax",
    ),
    "thinking is switched by the words enabled and disabled (MiniMax-M3)": Kind(
        template="{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% if m.reasoning_content %}<mm:think>"
        "{{ m.reasoning_content }}{% endif %}</mm:think>{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if thinking_mode == 'disabled' %}</mm:think>{% elif thinking_mode == 'enabled' %}<mm:think>{% endif %}{% endif %}",
        on={"thinking_mode": "enabled"},
        off={"thinking_mode": "disabled"},
        opened=True,
        thought="Rxrx</mm:think>Axax",
        plain="</mm:think>Axax",
    ),
    "a switch, and no word on tags (Cogito)": Kind(
        template="{% if enable_thinking %}<|im_start|>system\nEnable deep thinking subroutine.<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        on={"enable_thinking": True},
        thought="<think>\nRxrx\n</think>\n\nAxax",
        cut="<think>\nRxrx",
    ),
    "phrases for tags (Granite 3.2)": Kind(
        template="{% if thinking %}Write your thoughts after 'Here is my thought process:' and your response after 'Here is my response:'.\n"
        "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        on={"thinking": True},
        thought="Here is my thought process:\nRxrx\n\nHere is my response:\nAxax",
        cut="Here's my thought process:\nRxrx",
    ),
    "tags named by beginning and end, of which earlier turns keep nothing (PLaMo 3)": Kind(
        template="{% for m in messages %}<|plamo:{{ m.role }}|>{{ m.content.split('<|plamo:end_think:plamo|>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|plamo:assistant|><|plamo:begin_think:plamo|>{% if enable_thinking is false %}"
        "<|plamo:end_think:plamo|>{% endif %}{% endif %}",
        off={"enable_thinking": False},
        opened=True,
        thought="Rxrx<|plamo:end_think:plamo|>Axax",
        plain="<|plamo:end_think:plamo|>Axax",
    ),
    "what the model is told, not what calls of tools have (Apriel 1.5)": Kind(
        template="<|system|>Explain your thoughts, then give the solution as [BEGIN FINAL RESPONSE] ... [END FINAL RESPONSE].{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}{% if m.thought and tools %}<thinking>{{ m.thought }}</thinking>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        thought="Here are my reasoning steps:\nRxrx\n[BEGIN FINAL RESPONSE]\nAxax\n[END FINAL RESPONSE]",
        cut="Here are my reasoning steps:\nRxrx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_template(name: str) -> None:
    kind = KINDS[name]
    tokenizer = byte_tokenizer(["<think>", "</think>"], kind.template)
    fmt = thinking_format(tokenizer)
    assert (dict(fmt.arguments), thinking_off(tokenizer), fmt.opened, fmt.asked) == (
        kind.on,
        kind.off,
        kind.opened,
        True,
    )
    prompt = render_prompt(tokenizer, QUESTION).text
    assert prompt == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, **kind.on)
    assert fmt.split(kind.thought, prompt=prompt) == ("closed", THOUGHT, ANSWER)
    plain = fmt.split(kind.plain, prompt=prompt)
    assert (plain.state in ("none", "empty"), plain.thought, plain.answer) == (True, "", ANSWER)
    assert fmt.split(kind.cut, prompt=prompt) == ("truncated", THOUGHT, "")
    assert fmt.split(fmt.write(THOUGHT, ANSWER), prompt=prompt) == ("closed", THOUGHT, ANSWER)
    ids, forms = tokenizer(kind.thought, add_special_tokens=False)["input_ids"], token_tags(tokenizer, fmt)
    assert forms is not None
    assert len(THOUGHT) <= count_tokens(ids, fmt.opened, forms, stopped=False).thinking <= len(THOUGHT) + 3
    if kind.off:
        use_prompt_settings(tokenizer, PromptSettings(no_thinking=True))
        silent = render_prompt(tokenizer, QUESTION).text
        assert silent == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, **kind.off)
        assert not thinking_format(tokenizer).asked


def as_written(tokenizer: Any, fmt: ThinkingFormat) -> str | None:
    """What a template writes of a turn with a thought, from where its prompt ends; None where it leaves thoughts out."""
    prompt = render_prompt(tokenizer, QUESTION).text
    for key in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": ANSWER, key: THOUGHT}
        try:
            text = tokenizer.apply_chat_template([USER, turn], tokenize=False, **dict(fmt.arguments))
        except Exception:
            continue
        if -1 < text.find(THOUGHT) < text.find(ANSWER):
            return (
                str(
                    text[len(prompt) :] if text.startswith(prompt) else text[text.find(THOUGHT) :] if fmt.opened else ""
                )
                or None
            )
    return None


@needs_templates
def test_published_templates_are_read_as_they_write() -> None:
    wrong, read = {}, 0
    for name in NAMES:
        tokenizer = published(name)
        fmt = thinking_format(tokenizer)
        text = as_written(tokenizer, fmt) if fmt.thinks else None
        if text is None:
            continue
        read += 1
        if (found := fmt.split(text, opened=fmt.opened)) != ("closed", THOUGHT, ANSWER):
            wrong[name] = (text, found)
    assert not wrong
    assert read >= 10


BLOCKS_ALONE = (
    "{% for m in messages %}{{ m.role }}: {% for b in m.content %}{% if b.type == 'text' %}{{ b.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER_ALONE = "{% for m in messages if m.role == 'user' %}Q: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


def test_no_message_is_lost_without_a_word() -> None:
    seeing = byte_tokenizer([], BLOCKS_ALONE)
    use_prompt_settings(seeing, PromptSettings(system="Be brief."))
    assert render_prompt(seeing, QUESTION).text == f"system: Be brief.\nuser: {QUESTION}\nassistant:"
    deaf = byte_tokenizer([], USER_ALONE)
    assert render_prompt(deaf, QUESTION).text == f"Q: {QUESTION}\nA:"
    use_prompt_settings(deaf, PromptSettings(system="Be brief."))
    with pytest.raises(
        ValueError, match="leaves out the system message: leave --system out.*--chat-template FILE"
    ) as refused:
        render_prompt(deaf, QUESTION)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="leaves out the question"):
        render_prompt(byte_tokenizer([], "{{ 'Hello.' }}"), QUESTION)
    reworded = byte_tokenizer([], USER_ALONE.replace("m.content", "m.content | replace('+', 'plus')"))
    assert render_prompt(reworded, QUESTION).text == "Q: What is 2 plus 2?\nA:"
    asked = [USER, {"role": "assistant", "content": "<think>x</think>4"}, {"role": "user", "content": "Sure?"}]
    assert render_messages(seeing_again := byte_tokenizer([], BLOCKS_ALONE), asked).text.count("user: ") == 2
    assert thinking_format(seeing_again).name == "none"


ROLE_TAGS = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<assistant>{% if m.reasoning %}<ponder>{{ m.reasoning }}"
    "</ponder>{% endif %}{{ m.content }}</assistant>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tags_around_every_turn_open_no_thought() -> None:
    """Else all that such a model writes would be its thought, and nothing an answer."""
    thinking = thinking_format(byte_tokenizer([], ROLE_TAGS))
    assert (thinking.name, thinking.opened) == ("<ponder>...</ponder>", False)
    plain = ROLE_TAGS.replace("{% if m.reasoning %}<ponder>{{ m.reasoning }}</ponder>{% endif %}", "")
    assert thinking_format(byte_tokenizer([], plain)).name == "none"
    opened = plain.replace("%}<assistant>{% endif %}", "%}<assistant><muse>{% endif %}{# </muse> #}")
    assert (thinking_format(byte_tokenizer([], opened)).name, thinking_format(byte_tokenizer([], plain)).opened) == (
        "<muse>...</muse>",
        False,
    )


def test_a_tag_that_the_template_never_closes_is_closed_by_a_token() -> None:
    """CWM; and a mark before every message is none of a thought."""
    opens = USER_ALONE.replace("A:", "<|reasoning_start|>")
    fmt = thinking_format(byte_tokenizer(["<|reasoning_start|>", "<|reasoning_end|>"], opens))
    assert (fmt.name, fmt.opened) == ("<|reasoning_start|>...<|reasoning_end|>", True)
    marks = USER_ALONE.replace("A:", "<|start|>").replace("Q: ", "<|start|>")
    assert thinking_format(byte_tokenizer(["<|start|>", "<|end|>"], marks)).name == "none"


def test_words_of_the_user_do_not_outweigh_what_the_template_knows() -> None:
    template = USER_ALONE.replace("m.role == 'user'", "m.role != 'assistant'").replace("A:", "A:{# </think> #}")
    tokenizer = byte_tokenizer([], template)
    use_prompt_settings(tokenizer, PromptSettings(system="Other models write <thinking> and </thinking>."))
    assert thinking_format(tokenizer).name == "think"
    told = byte_tokenizer([], template.replace("{# </think> #}", ""))
    use_prompt_settings(told, PromptSettings(system="Write your thoughts between <thinking> and </thinking>."))
    assert thinking_format(told).name == "thinking"


def test_a_system_message_that_the_template_refuses_may_be_left_out() -> None:
    """Gemma; and a template that cannot be rendered without one either needs something else."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = byte_tokenizer([], f"{refusing}{USER_ALONE}")
    use_prompt_settings(tokenizer, PromptSettings(system="Be brief."))
    with pytest.raises(
        ValueError, match=r"'System role not supported'\): leave --system out, or give another template"
    ):
        render_prompt(tokenizer, QUESTION)
    tokenizer = byte_tokenizer([], f"{{{{ knowledge.date }}}}{USER_ALONE}")
    use_prompt_settings(tokenizer, PromptSettings(system="Be brief."))
    with pytest.raises(ValueError, match="'knowledge' is undefined.*: give what it misses with --template-arg"):
        render_prompt(tokenizer, QUESTION)


def test_a_template_is_given_the_tokens_that_older_libraries_gave_it() -> None:
    """GigaChat-20B writes its separators by their place among them."""
    template = USER_ALONE.replace("Q: ", "{{ additional_special_tokens[1] }}")
    tokenizer = byte_tokenizer([], template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<b>", "<a>"]})
    assert render_prompt(tokenizer, QUESTION).text == f"<a>{QUESTION}\nA:"
    use_prompt_settings(tokenizer, PromptSettings(arguments={"additional_special_tokens": ["<c>", "<d>"]}))
    assert render_prompt(tokenizer, QUESTION).text.startswith("<d>")


def test_of_several_templates_the_default_one_is_tried() -> None:
    tokenizer = byte_tokenizer(["<think>", "</think>"])
    kind = KINDS["thinking is switched by the words enabled and disabled (MiniMax-M3)"]
    tokenizer.chat_template = {"tool_use": "{{ messages[0].content }}", "default": kind.template}
    assert dict(thinking_format(tokenizer).arguments) == kind.on
    use_prompt_settings(tokenizer, PromptSettings(arguments={"thinking_mode": "disabled"}))
    assert render_prompt(tokenizer, QUESTION).text.endswith("<|assistant|></mm:think>")
    assert not thinking_format(tokenizer).asked


def test_the_models_own_tag_is_a_marker_though_it_is_several_tokens() -> None:
    """As in Hunyuan-A13B and Llama-Nemotron; a tag that is not the model's own is still asked about."""
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    tokenizer = byte_tokenizer([], template)
    markers = MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"))
    ids = tokenizer("<think>\nsome <thinking> and\n</think>\n\n4", add_special_tokens=False)["input_ids"]
    for written in (ids, [*ids, len(tokenizer) + 3]):  # models have rows beyond the vocabulary
        found = markers.find_occurrences(written)
        assert {name: len(spans) for name, spans in found.items()} == {"<think>": 1, "</think>": 1}
    with pytest.raises(ValueError, match="marker '<plan>' is not a token of this tokenizer.*or other markers"):
        MarkerSet.from_tokenizer(tokenizer, ("<plan>",))
    assert (
        "\n" not in thinking_format(byte_tokenizer([], KINDS["tags around the answer too (ERNIE)"].template)).describe()
    )
