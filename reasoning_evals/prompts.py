"""From a question to the exact prompt of every arm: the chat template's own output. Works with any tokenizer object.

Also prompts that ask for careful thinking, before or inside the thought: the cheapest alternative to steering. RICE compares
itself with both (arXiv 2505.14681, Table 7: thinking prompt before and after ``<think>``). The wording here is
this project's own; give the text of your study instead.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_steer.thinking import (
    ThinkingFormat,
    prompt_settings,
    render,
    thinking_format,
    thinking_off,
    use_prompt_settings,
)

__all__ = [
    "FINISHED",
    "THINKING_PROMPT",
    "RenderedPrompt",
    "follows_effort",
    "prompt_before_thought",
    "prompt_inside_thought",
    "prompt_with_effort",
    "prompt_with_empty_thought",
    "prompt_with_request",
    "prompt_without_thinking",
    "render_messages",
    "render_prompt",
    "thinking_format",
]

THINKING_PROMPT = (
    "I will think this through step by step, follow each idea to its end before I try another one, "
    "and check the result before I answer."
)

FINISHED = "Okay, I think I have finished thinking."
"""The whole thought of NoThinking (arXiv 2504.09858)."""


class RenderedPrompt(NamedTuple):
    """A prompt as text and as its token ids, including BOS where the template writes one."""

    text: str
    token_ids: tuple[int, ...]


def render_prompt(tokenizer: Any, question: str, *, thinking: bool = True) -> RenderedPrompt:
    """One user turn in the tokenizer's chat template, opened for the assistant: the template's own output, to the byte.

    Thinking is switched on where the model can think, unless the user asked otherwise (``use_prompt_settings``); with
    ``thinking=False`` it is switched off where the template can do that. Only behind a bare template, which says nothing
    about thinking, ``<think>`` is written where the tokenizer has it as a token (protocol of the R1 model card). The ids come
    from this text without added special tokens, so that a BOS in the template is not doubled. ValueError when the tokenizer
    has no chat template, or it cannot be rendered.
    """
    turn = [{"role": "user", "content": question}]
    if not thinking:
        return _rendered(tokenizer, render(tokenizer, turn, **thinking_off(tokenizer)))
    return render_messages(tokenizer, turn)


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> RenderedPrompt:
    """A conversation (``role`` and ``content`` of each message) in the tokenizer's chat template, opened for the assistant, with
    thinking on as in ``render_prompt``."""
    fmt = thinking_format(tokenizer)
    return _rendered(tokenizer, render(tokenizer, messages, **dict(fmt.arguments)) + fmt.append)


def prompt_before_thought(tokenizer: Any, text: str = THINKING_PROMPT) -> Callable[[str], RenderedPrompt]:
    """Renders a question with ``text`` at the start of the assistant's turn, right before the tag that opens the thought.

    The prompt ends inside the thought. ValueError when the text is empty or contains a tag, for a model that does not think,
    and as ``render_prompt``.
    """
    fmt, words = _checked(tokenizer, text)

    def render_words(question: str) -> RenderedPrompt:
        prompt = render_prompt(tokenizer, question).text
        tag = fmt.open.strip()
        head, tail = prompt, fmt.open.removeprefix(tag)
        if fmt.opened:
            head, _, tail = prompt.rpartition(tag)
        return _rendered(tokenizer, f"{head}{words}\n{tag}{tail}")

    return render_words


def prompt_inside_thought(tokenizer: Any, text: str = THINKING_PROMPT) -> Callable[[str], RenderedPrompt]:
    """Renders a question with ``text`` at the start of the thought: the model continues a thought that starts with it.

    The prompt ends inside the thought, but not in its tag. ValueError as ``prompt_before_thought``.
    """
    fmt, words = _checked(tokenizer, text)

    def render_words(question: str) -> RenderedPrompt:
        return _rendered(tokenizer, f"{_opened(tokenizer, fmt, question)}\n{words}\n")

    return render_words


def prompt_with_empty_thought(tokenizer: Any) -> Callable[[str], RenderedPrompt]:
    """Renders a question with a thought that says only `FINISHED` and is closed: the model goes on with its answer (NoThinking,
    arXiv 2504.09858). ValueError as ``prompt_before_thought``."""
    fmt, words = _checked(tokenizer, FINISHED)
    if fmt.split("42", opened=False).answer != "42":
        raise ValueError(
            "in this format a text that does not begin with a header of its own is no answer, and behind an empty thought none begins "
            "so: leave no-thinking out; the model's own words for little thought are effort:WORD"
        )

    def render_words(question: str) -> RenderedPrompt:
        return _rendered(tokenizer, f"{_opened(tokenizer, fmt, question)}\n{words}\n{fmt.close.lstrip()}")

    return render_words


def prompt_without_thinking(tokenizer: Any) -> Callable[[str], RenderedPrompt]:
    """Renders a question with thinking switched off by the template's own switch. ValueError where it has none."""
    if not thinking_off(tokenizer):
        raise ValueError(
            "this chat template has no switch that turns thinking off: leave the rule out, or give the model an empty thought (no-thinking)"
        )
    return lambda question: render_prompt(tokenizer, question, thinking=False)


def prompt_with_effort(tokenizer: Any, word: str) -> Callable[[str], RenderedPrompt]:
    """Renders a question with the model's own word for how hard to think. ValueError where the template reads none, or takes no
    notice of this one: templates take unknown words without a complaint, as their default."""
    if not follows_effort(tokenizer, word):
        raise ValueError(f"the chat template takes no notice of the effort {word!r}: give a word that it knows")
    asked = _with_effort(tokenizer, word)
    return lambda question: render_prompt(asked, question)


def follows_effort(tokenizer: Any, word: str) -> bool:
    """Whether the prompt says this word for how hard to think, or is another without it. A default that a template writes nothing
    for looks like a word that it does not know. ValueError where the template reads none."""
    text, plain = render_prompt(_with_effort(tokenizer, word), "?").text, _with_effort(tokenizer, None)
    # The default changes nothing: it is named in the prompt (gpt-oss: "Reasoning: medium"), or asked for here to have any thought.
    default = (
        re.search(rf"\b{re.escape(word)}\b", text, re.I) or word in dict(thinking_format(plain).arguments).values()
    )
    return bool(default) or text != render_prompt(plain, "?").text


def _with_effort(tokenizer: Any, word: str | None) -> Any:
    asked = copy.copy(tokenizer)  # prompt settings belong to a tokenizer
    use_prompt_settings(asked, dataclasses.replace(prompt_settings(tokenizer), effort=word))
    return asked


def prompt_with_request(tokenizer: Any, text: str) -> Callable[[str], RenderedPrompt]:
    """Renders a question followed by ``text`` in the user's turn, such as "Be brief.".

    ValueError when the text is empty or contains a tag, and as ``render_prompt``.
    """
    words = _words(text, thinking_format(tokenizer))
    return lambda question: render_prompt(tokenizer, f"{question} {words}")


def _opened(tokenizer: Any, fmt: ThinkingFormat, question: str) -> str:
    """The prompt up to the tag that opens its thought, whoever writes that."""
    prompt = render_prompt(tokenizer, question).text
    return (prompt if fmt.opened else prompt + fmt.open).rstrip()


def _checked(tokenizer: Any, text: str) -> tuple[ThinkingFormat, str]:
    fmt = thinking_format(tokenizer)
    if not (fmt.thinks and fmt.asked):
        raise ValueError(
            f"a thinking prompt needs a model that thinks, and {fmt.describe()}: leave it out, or name the format with --thinking"
        )
    return fmt, _words(text, fmt)


def _words(text: str, fmt: ThinkingFormat) -> str:
    tags = [item.text for item in fmt.switches]
    if not text.strip() or any(tag in text for tag in tags):
        without = f", and none of {' '.join(tags)}" if tags else ""
        raise ValueError(f"the thinking prompt is {text!r}: give words{without}")
    return text.strip()


def _rendered(tokenizer: Any, text: str) -> RenderedPrompt:
    return RenderedPrompt(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
