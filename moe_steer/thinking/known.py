"""The thinking formats that models were trained on, by name. A template that writes other tags needs no entry: they are read
from it (``probing``)."""

from __future__ import annotations

import re

from moe_steer.thinking.format import ANSWER, OUTSIDE, THOUGHT, Switch, ThinkingFormat


def tags(
    name: str,
    open: str,
    close: str,
    *,
    pattern: str = "",
    closing: str = "",
    answer: str = "",
    end: str = "",
    joint: str = "",
) -> ThinkingFormat:
    """A thought between two tags.

    ``open``, ``close``: with the white space that belongs to them. ``pattern``: other spellings of the opening tag, such as
    with attributes; ``closing``: of the closing one. ``answer``, ``end``: marks around the answer, where the format has them; ``joint``: the white space
    between the closing tag and the mark.
    """
    switches = [
        Switch(open.strip(), THOUGHT, pattern=pattern),
        Switch(close.strip(), ANSWER, closes=True, pattern=closing),
    ]
    switches += [Switch(answer.strip(), ANSWER)] if answer else []
    switches += [Switch(end.strip(), OUTSIDE)] if end else []
    return ThinkingFormat(
        name=name,
        open=open,
        close=f"{close}{joint}{answer}",
        end=end,
        switches=tuple(item for item in switches if item.text),
    )


def channels() -> ThinkingFormat:
    """Harmony (gpt-oss): messages in channels. analysis is the thought, final the answer, commentary neither."""
    header = r"(?:<\|start\|>assistant)?<\|channel\|>{channel}(?:(?!<\|channel\|>|<\|message\|>)[^\n])*<\|message\|>"

    def channel(name: str, phase: int) -> Switch:
        return Switch(f"<|channel|>{name}<|message|>", phase, pattern=header.format(channel=name))

    return ThinkingFormat(
        name="harmony",
        open="<|channel|>analysis<|message|>",
        close="<|end|><|start|>assistant<|channel|>final<|message|>",
        starts=OUTSIDE,
        switches=(
            channel("analysis", THOUGHT),
            channel("final", ANSWER),
            channel("commentary", OUTSIDE),
            *(Switch(text, OUTSIDE) for text in ("<|end|>", "<|call|>", "<|return|>")),
        ),
    )


NONE = ThinkingFormat(name="none")
_ALL = (
    tags("think", "<think>\n", "\n</think>\n\n", pattern=r"<think(?:\s[^<>\n]*)?>"),
    channels(),
    tags("channel", "<|channel>thought\n", "<channel|>"),
    tags("bracket-think", "[THINK]", "[/THINK]"),
    tags("seed-think", "<seed:think>", "</seed:think>"),
    tags("thinking", "<thinking>\n", "\n</thinking>\n\n"),
    tags(
        "start-thinking", "<|START_THINKING|>", "<|END_THINKING|>", answer="<|START_RESPONSE|>", end="<|END_RESPONSE|>"
    ),
    tags(
        "begin-of-thought",
        "<|begin_of_thought|>\n\n",
        "\n\n<|end_of_thought|>",
        joint="\n\n",
        answer="<|begin_of_solution|>\n\n",
        end="\n\n<|end_of_solution|>",
    ),
    tags("triangle-think", "\u25c1think\u25b7", "\u25c1/think\u25b7"),
    tags("inner", "<|inner_prefix|>", "<|inner_suffix|>"),
    tags(  # Granite 3.2
        "thought-process",
        "Here is my thought process:\n",
        "\n\nHere is my response:\n",
        pattern="Here(?: is|'s) my thought process:",
        closing="Here(?: is|'s) my response:",
    ),
    tags("final-response", "Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
    tags("reasoning", "<reasoning>\n", "\n</reasoning>\n\n"),
    tags("thought", "<thought>\n", "\n</thought>\n\n"),
)
FORMATS = {item.name: item for item in (*_ALL, NONE)}
"""Every known format by name."""
_STRIPPED_HARMONY = ThinkingFormat(
    # What is left of harmony where an engine removed the special tokens.
    name="harmony",
    open="analysis",
    close="assistantfinal",
    starts=OUTSIDE,
    switches=(
        Switch("analysis", THOUGHT, pattern=r"\Aanalysis(?=[^\s]|[\s\S]*assistantfinal)"),
        Switch("assistantfinal", ANSWER, closes=True, pattern=r"(?<=\S)assistantfinal"),
    ),
)
_STRIPPED = re.compile(r"\s*analysis(?:[A-Z0-9\"'(\\]|[\s\S]*assistantfinal)")


def named(text: str) -> ThinkingFormat:
    """The format of a name, or of ``OPEN...CLOSE``: the two texts around a thought. ValueError for anything else."""
    if text in FORMATS:
        return FORMATS[text]
    open_tag, dots, close_tag = text.partition("...")
    if dots and open_tag.strip() and close_tag.strip() and open_tag.strip() != close_tag.strip():
        return tags(f"{open_tag.strip()}...{close_tag.strip()}", open_tag, close_tag)
    raise ValueError(
        f"the thinking format {text!r} is unknown: give one of {', '.join(FORMATS)}, or the two tags as OPEN...CLOSE"
    )


def opening_shown(text: str | None) -> ThinkingFormat | None:
    """The format whose opening tag a text starts with, if it does."""
    start = (text or "").lstrip()
    for item in _ALL:
        if any(s.phase == THOUGHT and re.match(s.pattern or re.escape(s.text), start) for s in item.switches):
            return item
    return _STRIPPED_HARMONY if _STRIPPED.match(start) else None


def read_from_text(text: str | None, opened: bool = False) -> ThinkingFormat:
    """The format that a response shows by itself, where nothing else tells: by the tag that it starts with, else by the first
    closing tag in it, else ``think``."""
    if not text:
        return FORMATS["think"]
    if not opened and (shown := opening_shown(text)):
        return shown
    found = [(text.find(s.text), item.name) for item in _ALL for s in item.switches if s.closes and s.text in text]
    return FORMATS[min(found)[1]] if found else FORMATS["think"]
