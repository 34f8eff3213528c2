"""From a question to the exact prompt of every arm. Works with any tokenizer object and imports none.

Also prompts that ask for careful thinking, before or inside the thought: the cheapest alternative to steering. RICE compares
itself with both (arXiv 2505.14681, Table 7: thinking prompt before and after ``<think>``). The wording here is
this project's own; give the text of your study instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from reasoning_evals.thinking import CLOSE_TAG, OPEN_TAG

THINKING_PROMPT = (
    "I will think this through step by step, follow each idea to its end before I try another one, "
    "and check the result before I answer."
)


class RenderedPrompt(NamedTuple):
    """A prompt as text and as its token ids, including BOS where the template writes one."""

    text: str
    token_ids: tuple[int, ...]


def render_prompt(tokenizer: Any, question: str, force_think: bool = True) -> RenderedPrompt:
    """One user turn in the tokenizer's chat template, opened for the assistant; no system prompt.

    ``force_think`` makes the prompt end inside a thought (protocol of the R1 model card); a template that already ends in
    ``<think>`` is not changed. The ids come from the template's own text without added special tokens, so that a BOS in the
    template is not doubled. ValueError when the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template: set tokenizer.chat_template, or use an instruction-tuned model"
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    if force_think and not prompt_opens_thought(text):
        text += f"{OPEN_TAG}\n"
    return RenderedPrompt(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def prompt_opens_thought(prompt: str) -> bool:
    """Whether the prompt ends right after ``<think>`` (white space aside), so that a completion starts inside the thought.

    >>> prompt_opens_thought("<|Assistant|><think>\\n"), prompt_opens_thought("What is a <think> tag?")
    (True, False)
    """
    return prompt.rstrip().endswith(OPEN_TAG)


class TagIds(NamedTuple):
    """The token ids that ``<think>`` and ``</think>`` are written with: one each in every tokenizer of a reasoning model."""

    open: tuple[int, ...]
    close: tuple[int, ...]


def tag_ids(tokenizer: Any) -> TagIds:
    """Read them from a tokenizer."""

    def ids(tag: str) -> tuple[int, ...]:
        token_id = tokenizer.convert_tokens_to_ids(tag)
        if isinstance(token_id, int) and token_id >= 0 and token_id != tokenizer.unk_token_id:
            return (token_id,)
        return tuple(tokenizer(tag, add_special_tokens=False)["input_ids"])

    return TagIds(ids(OPEN_TAG), ids(CLOSE_TAG))


def prompt_before_thought(tokenizer: Any, text: str = THINKING_PROMPT) -> Callable[[str], RenderedPrompt]:
    """Renders a question with ``text`` at the start of the assistant's turn, right before ``<think>``.

    The prompt ends inside the thought, as it would without the text. ValueError when the text is empty or contains a tag,
    and as ``render_prompt``.
    """
    words = _checked(text)

    def render(question: str) -> RenderedPrompt:
        head, _, tail = render_prompt(tokenizer, question).text.rpartition(OPEN_TAG)
        return _rendered(tokenizer, f"{head}{words}\n{OPEN_TAG}{tail}")

    return render


def prompt_inside_thought(tokenizer: Any, text: str = THINKING_PROMPT) -> Callable[[str], RenderedPrompt]:
    """Renders a question with ``text`` right after ``<think>``: the model continues a thought that starts with it.

    The prompt ends inside the thought, but not in ``<think>``. ValueError as ``prompt_before_thought``.
    """
    words = _checked(text)

    def render(question: str) -> RenderedPrompt:
        return _rendered(tokenizer, f"{render_prompt(tokenizer, question).text.rstrip()}\n{words}\n")

    return render


def prompt_with_request(tokenizer: Any, text: str) -> Callable[[str], RenderedPrompt]:
    """Renders a question followed by ``text`` in the user's turn, such as "Be brief.".

    ValueError as ``prompt_before_thought``.
    """
    words = _checked(text)
    return lambda question: render_prompt(tokenizer, f"{question} {words}")


def _checked(text: str) -> str:
    if not text.strip() or OPEN_TAG in text or CLOSE_TAG in text:
        raise ValueError(f"the thinking prompt is {text!r}: give words, and neither {OPEN_TAG} nor {CLOSE_TAG}")
    return text.strip()


def _rendered(tokenizer: Any, text: str) -> RenderedPrompt:
    return RenderedPrompt(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
