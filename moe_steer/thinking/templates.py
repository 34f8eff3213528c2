"""Chat templates: what the user asked of prompts, and a template's own output for it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_steer.json_files import quoted

Messages = Sequence[Mapping[str, Any]]

_ASKED: weakref.WeakKeyDictionary[Any, PromptSettings] = weakref.WeakKeyDictionary()
_EFFORT_NAMES = ("reasoning_effort", "thinking_effort", "reasoning_strength", "effort")


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What the user asked of prompts, beyond what the template does by itself."""

    thinking: str | None = None
    """The thinking format by name or as OPEN...CLOSE; None: as found by trying the template."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the template."""
    effort: str | None = None
    """How hard to think, in the template's own words."""
    no_thinking: bool = False
    """Switch thinking off."""
    chat_template: str | None = None
    """Text of a template, in place of the tokenizer's own."""
    system: str | None = None
    """A system message."""


def use_prompt_settings(tokenizer: Any, settings: PromptSettings) -> None:
    """From now on prompts of this tokenizer are rendered so. ValueError for what its template would not follow."""
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    names = variables(tokenizer)
    if settings.effort is not None and not effort_name(tokenizer):
        raise ValueError(
            f"--effort {settings.effort!r}: this chat template reads none of {', '.join(_EFFORT_NAMES)}; it reads {_listed(names)}: "
            "give --template-arg NAME=VALUE, or words for the model with --system"
        )
    for name in settings.arguments:
        if name not in names:
            raise ValueError(f"--template-arg {name}: this chat template does not read it; it reads {_listed(names)}")
    _ASKED[tokenizer] = settings


def prompt_settings(tokenizer: Any) -> PromptSettings:
    """What ``use_prompt_settings`` was given for this tokenizer; else nothing asked."""
    return _ASKED.get(tokenizer, PromptSettings())


def effort_name(tokenizer: Any) -> str | None:
    """The argument by which the template takes how hard to think."""
    return next((name for name in _EFFORT_NAMES if name in variables(tokenizer)), None)


def render(tokenizer: Any, messages: Messages, *, prompt: bool = True, **arguments: Any) -> str:
    """The template's own output. ``prompt``: opened for the assistant. ValueError, in one line, where there is no template or
    it cannot be rendered."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {name!r} has no chat template: give one with --chat-template FILE (tokenizer.chat_template), "
            "or use an instruction-tuned model that brings its own"
        )
    asked = prompt_settings(tokenizer)
    if asked.effort is not None:
        arguments = {str(effort_name(tokenizer)): asked.effort, **arguments}
    system = [{"role": "system", "content": asked.system}] if asked.system is not None else []
    given = {"tokenize": False, "add_generation_prompt": prompt, **arguments, **asked.arguments}
    if "additional_special_tokens" in variables(tokenizer):  # GigaChat-20B; transformers 4 gave templates these
        given = {"additional_special_tokens": [*getattr(tokenizer, "extra_special_tokens", ())], **given}
    turns = [*system, *messages]
    try:
        text = _applied(tokenizer, turns, given)
    except Exception as error:  # templates are programs: they may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way = "give what it misses with --template-arg NAME=VALUE"
        with contextlib.suppress(Exception):
            way = "leave --system out" if system and _applied(tokenizer, messages, given) else way
        raise ValueError(
            f"the chat template of {name!r} cannot be rendered ({quoted(first)}): {way}, or give another template with --chat-template FILE"
        ) from error
    role = _left_out(turns, text)
    if role is not None:
        words = [{**turn, "content": f"Qz{number}qz"} for number, turn in enumerate(turns)]
        with contextlib.suppress(Exception):
            if _left_out(words, _applied(tokenizer, words, given)) is None:
                return text  # it writes its messages in other words
        what, way = ("system message", "leave --system out, or ") if role == "system" else ("question", "")
        raise ValueError(
            f"the chat template of {name!r} leaves out the {what}: {way}give another template with --chat-template FILE"
        )
    return text


def _applied(tokenizer: Any, turns: Messages, given: Mapping[str, Any]) -> str:
    """The template's output, in the first of the forms of a conversation that loses no message. Templates of models that see
    take contents as a list of blocks alone, and say nothing of a text; some that were made for tools take an empty list of them, and no
    None."""
    blocks = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]
    found: str | None = None
    failed: Exception | None = None
    tools: tuple[dict[str, Any], ...] = ({}, {"tools": []})
    for form in (turns, blocks):
        for more in tools:
            try:
                text = str(tokenizer.apply_chat_template(list(form), **{**more, **given}))
            except Exception as error:
                failed = failed or error
                continue
            if _left_out(turns, text) is None:
                return text
            found = text if found is None else found
            break
    if found is None:
        assert failed is not None
        raise failed
    return found


def _left_out(turns: Messages, text: str) -> str | None:
    """The role of a message that is not in a text; of the assistant's own thoughts are left out by right."""
    for turn in turns:
        content = turn.get("content")
        if turn.get("role") in ("user", "system") and isinstance(content, str) and content.strip() not in text:
            return str(turn["role"])
    return None


def variables(tokenizer: Any) -> frozenset[str]:
    """The names that the template reads and does not define itself; none for a template that cannot be parsed."""
    return _variables(template_text(tokenizer))


def template_text(tokenizer: Any) -> str:
    """The text of the template by which a conversation is rendered; empty where there is none. Of several templates by name
    (a publisher's ``default``, ``tool_use``, ...) it is ``default``, which transformers takes too."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else ""


@functools.lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template).environment
        found = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return frozenset()
    return frozenset(found) - {"raise_exception", "strftime_now"}


def _listed(names: frozenset[str]) -> str:
    given = names - {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools"}
    return ", ".join(sorted(given)) or "no argument of its own"
