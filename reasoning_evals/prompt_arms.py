"""Prompts that ask for care, before or inside the thought: the cheapest rivals of steering.

RICE compares itself with both (arXiv 2505.14681, Table 7: thinking prompt before and after ``<think>``). The wording here is
this project's own; give the text of your study instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reasoning_evals.prompts import RenderedPrompt, render_prompt
from reasoning_evals.thinking import CLOSE_TAG, OPEN_TAG

THINKING_PROMPT = (
    "I will think this through step by step, follow each idea to its end before I try another one, "
    "and check the result before I answer."
)


def prompt_before_thought(tokenizer: Any, text: str = THINKING_PROMPT) -> Callable[[str], RenderedPrompt]:
    """Renders a question with ``text`` at the start of the assistant's turn, right before ``<think>``.

    The prompt ends inside the thought, as without the text. ValueError when the text is empty or has a tag in it, and what
    ``render_prompt`` raises.
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
    """Renders a question followed by ``text`` in the user's own turn, such as "Be brief.".

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
