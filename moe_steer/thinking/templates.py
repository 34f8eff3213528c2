"""Chat templates: what the user asked of prompts, and a template's own output for it."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_steer.json_files import quoted

Messages = Sequence[Mapping[str, Any]]

_ASKED: weakref.WeakKeyDictionary[Any, PromptSettings] = weakref.WeakKeyDictionary()
_EFFORT_NAMES = ("reasoning_effort", "thinking_effort", "effort")


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
    try:
        try:
            text = tokenizer.apply_chat_template([*system, *messages], **given)
        except Exception:  # a template that was made for tools alone takes an empty list, and no None
            text = tokenizer.apply_chat_template([*system, *messages], **{"tools": [], **given})
    except Exception as error:  # templates are programs: they may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the chat template of {name!r} cannot be rendered ({quoted(first)}): give what it misses with --template-arg NAME=VALUE, "
            "or another template with --chat-template FILE"
        ) from error
    question = messages[-1].get("content") if prompt and messages else None
    words = re.findall(r"\w+", question) if isinstance(question, str) else []
    if words and max(words, key=len) not in str(text):
        raise ValueError(
            f"the chat template of {name!r} leaves the question out of the prompt: give another template with --chat-template FILE"
        )
    return str(text)


def variables(tokenizer: Any) -> frozenset[str]:
    """The names that the template reads and does not define itself; none for a template that cannot be parsed."""
    template = getattr(tokenizer, "chat_template", None)
    return _variables(template) if isinstance(template, str) else frozenset()


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
