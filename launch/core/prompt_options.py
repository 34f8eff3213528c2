"""Options that decide the prompts: how a model is asked to think, and how its answers are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from launch.core.option_checks import PROMPTS

if TYPE_CHECKING:
    from reasoning_evals.engines import Chat


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are rendered; without any, as the chat template does it, with thinking on where the model can think."""

    thinking: str | None = None
    """How the model writes its thoughts, where trying its template does not tell: think, harmony, none, ..., or its two tags as OPEN...CLOSE."""
    template_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, PROMPTS] = ()
    """An argument for the chat template, as NAME=VALUE; may be given several times."""
    effort: Annotated[str | None, PROMPTS] = None
    """How hard to think, in the template's own words (low, medium, high)."""
    no_thinking: Annotated[bool, PROMPTS] = False
    """Switch thinking off, where the template can."""
    chat_template: str | None = None
    """File of a chat template, in place of the tokenizer's own."""
    system: Annotated[str | None, PROMPTS] = None
    """A system message before every question."""

    repeatable: ClassVar = frozenset({"template_arg"})
    """Lists that are given one value at a time."""


def ask_prompts(tokenizer: Any, options: PromptOptions, *, quiet: bool = False) -> None:
    """Render this tokenizer's prompts as asked from now on, and say how the model thinks. ValueError in one line for
    what its template would not follow."""
    from moe_steer.thinking import PromptSettings, thinking_format, use_prompt_settings

    asked = PromptSettings(
        thinking=options.thinking,
        arguments=template_arguments(options.template_arg),
        effort=options.effort,
        no_thinking=options.no_thinking,
        chat_template=None if options.chat_template is None else _read(options.chat_template),
        system=options.system,
    )
    use_prompt_settings(tokenizer, asked)
    fmt = thinking_format(tokenizer)
    if not quiet and (fmt.thinks or asked != PromptSettings()):
        print(fmt.describe(), flush=True)


def chat_of(options: PromptOptions) -> Chat:
    """How these options ask a chat endpoint. ValueError in one line for what such a request cannot say."""
    from moe_steer.thinking import FORMATS, named
    from reasoning_evals.engines import Chat

    if options.no_thinking or options.chat_template is not None:
        name = "--no-thinking" if options.no_thinking else "--chat-template"
        raise ValueError(
            f"{name} is for prompts that are rendered here, and a chat endpoint renders its own: say it to its template, "
            "as --template-arg enable_thinking=false or --effort none"
        )
    return Chat(
        fmt=FORMATS["think"] if options.thinking is None else named(options.thinking),
        system=options.system,
        effort=options.effort,
        template_arguments=template_arguments(options.template_arg),
    )


def template_arguments(items: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE``: a value that is JSON is read as JSON (true, 3), any other is a text."""
    from moe_steer.json_files import NotJSON, parse_json

    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-arg {item!r}: write NAME=VALUE, for example enable_thinking=false")
        if name in found:
            raise ValueError(f"--template-arg {name} is given twice: give it once")
        try:
            found[name] = parse_json(value, item, "")
        except NotJSON:
            found[name] = value
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--chat-template {path!r} cannot be read ({error}): give a file with a Jinja template"
        ) from error
