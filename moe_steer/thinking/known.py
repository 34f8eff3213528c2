"""Thinking formats by name, those that models were trained on; and as a template writes them around an earlier turn.

A template that writes other tags needs no name: they are read from what stands around the thought and the answer (``read_turn``). One tag
before the thought and one after it is the common case. Others start a new message for the answer (Solar, Muse), build their tags of several
marks (Kimi-K3), or mark the answer too (Command A, ERNIE): there the single tags mean nothing, or stay in the answer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from moe_steer.thinking.format import ANSWER, OUTSIDE, THOUGHT, Switch, ThinkingFormat

_MARK = r"(?:<\|[^|<>]*\|?>|<[^<>\s][^<>]{0,60}>|\[[^\[\]\n]{1,60}\])"
TAG_AT_END = re.compile(r"([<\[][^<>\[\]\s/][^<>\[\]\n]{0,60}[>\]])(\s*)\Z")
_TAG_AT_START = re.compile(r"\A(\s*)([<\[][^<>\[\]\n]{1,60}[>\]]\s*)")
_MARKS_ALONE = re.compile(rf"\s*{_MARK}\s*(?:{_MARK}\s*)*\Z")
_FIRST_MARK = re.compile(rf"\s*({_MARK})")
_MARK_AT_END = re.compile(rf"{_MARK}\Z")
_OF_THOUGHTS = re.compile(r"think|thought|reason|deliberat|reflect|inner", re.IGNORECASE)
_ENDS = (("begin", "end"), ("start", "end"), ("open", "close"), ("prefix", "suffix"))
"""How the names of two tags differ, where the second has no slash."""


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
    tags(
        "final-response",
        "Here are my reasoning steps:\n",
        "\n[BEGIN FINAL RESPONSE]\n",
        end="\n[END FINAL RESPONSE]",  # Apriel 1.5; 1.6 ends without
    ),
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


class Turn(NamedTuple):
    """What a template writes around an earlier turn of the assistant that had a thought."""

    before: str
    """Everything up to the thought."""
    between: str
    after: str
    """What follows the answer."""


def read_turn(turn: Turn, user: str = "", openings: Iterable[str] = ()) -> ThinkingFormat | None:
    """The format of a turn; None where it has no tags.

    ``user``: the conversation before the assistant's turn. ``openings``: what prompts write behind it to open that turn, with
    thinking on and off. What the turn has beyond one of them opens the thought.
    """
    begun = turn.before.removeprefix(common_start(turn.before, user))
    opening = _opening(begun, user, openings)
    if opening is None:
        return None
    header = begun.removesuffix(opening).strip()
    if _FIRST_MARK.match(header) and header in turn.between:
        return _of_messages(turn, opening, header)
    first, inner = _FIRST_MARK.match(opening), turn.between.strip()
    at = inner.rfind(first[1]) if first else -1
    if at > 0:  # tags of several marks, which begin alike
        closing = inner[:at]
        end = _FIRST_MARK.match(turn.after)
        return tags(f"{opening.strip()}...{closing}", opening, closing, answer=inner[at:], end=end[1] if end else "")
    match = _TAG_AT_START.search(turn.between)
    if not match or opening.strip() == match[2].strip():
        return None
    word = re.match(r"<([^\s<>]+)\s[^<>]*>\Z", opening.strip())
    pattern = f"<{re.escape(word[1])}(?:\\s[^<>\\n]*)?>" if word else ""
    name = f"{opening.strip()}...{match[2].strip()}"
    return tags(name, opening, match[1] + match[2], pattern=pattern)


def with_answer_marks(found: ThinkingFormat, turn: Turn) -> ThinkingFormat:
    """The format with the marks that this template writes around the answer, where they are marks and nothing else."""
    close = found.closing
    if not close or close not in turn.between or found.starts != ANSWER:
        return found
    rest, end = turn.between.partition(close)[2], _FIRST_MARK.match(turn.after)
    if not end or not _MARKS_ALONE.match(rest):
        return found
    mark, texts = rest.strip(), {item.text for item in found.switches}
    more = [Switch(mark, ANSWER), Switch(end[1], OUTSIDE)]
    switches = (*found.switches, *(item for item in more if item.text not in texts))
    kept = found.close.partition(close)[0]
    return dataclasses.replace(found, close=f"{kept}{close}{rest}", end=end[1], switches=switches)


def closings_of(opening: str) -> list[str]:
    """What may close what a tag opens, by its name.

    >>> closings_of("<muse level='3'>"), closings_of("<|begin_think|>")[1:]
    (['</muse>'], ['<|end_think|>'])
    """
    word = re.match(r"[<\[]([^\s<>\[\]]+)", opening)
    found = [f"{opening[0]}/{word[1]}{opening[-1]}"] if word else []
    if not _OF_THOUGHTS.search(opening):
        return found  # else the names of messages: <|start|>
    pairs = [pair for first, last in _ENDS for pair in ((first, last), (first.upper(), last.upper()))]
    return found + [opening.replace(first, last) for first, last in pairs if first in opening]


def common_start(one: str, other: str) -> str:
    """The text that two texts begin with."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _opening(begun: str, user: str, openings: Iterable[str]) -> str | None:
    """What opens a thought: one tag, or, where that tag stands before every message, all that this turn has beyond a prompt."""
    tag = TAG_AT_END.search(begun)
    if tag and tag[1] not in user:
        return tag[1] + tag[2]
    rests = [begun.removeprefix(common_start(begun, opening)) for opening in openings]
    whole = max((rest for rest in rests if rest != begun), key=len, default="")
    mark = _MARK_AT_END.search(begun.removesuffix(whole))
    return f"{mark[0] if mark else ''}{whole}" if whole.strip() else None


def _of_messages(turn: Turn, opening: str, header: str) -> ThinkingFormat:
    """A format in which the answer is a message of its own, behind the same header as the thought."""
    closing, _, answering = turn.between.rpartition(header)
    place = rf"(?:\A|{re.escape(header)})\s*"
    switches = [
        Switch(opening, THOUGHT, pattern=place + re.escape(opening.strip())),
        Switch(turn.between.strip(), ANSWER, closes=True),
    ]
    if answering.strip():
        switches.append(Switch(answering, ANSWER, pattern=place + re.escape(answering.strip())))
    ends = [mark[1] for text in (closing, turn.after) if (mark := _FIRST_MARK.match(text))]
    switches += [Switch(text, OUTSIDE) for text in dict.fromkeys(ends)]
    return ThinkingFormat(
        name=f"{opening.strip()}...{closing.strip()}",
        open=opening,
        close=turn.between,
        end=ends[-1] if ends else "",
        starts=OUTSIDE if answering.strip() else ANSWER,
        switches=tuple(switches),
    )
