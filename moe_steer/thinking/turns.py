"""A thinking format as a template writes it: what stands around the thought and the answer of an earlier turn.

One tag before the thought and one after it is the common case. Others start a new message for the answer (Solar, Muse), build
their tags of several marks (Kimi-K3), or mark the answer too (Command A, ERNIE): there the single tags mean nothing, or stay in
the answer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from moe_steer.thinking.format import ANSWER, OUTSIDE, THOUGHT, Switch, ThinkingFormat
from moe_steer.thinking.known import tags

_MARK = r"(?:<\|[^|<>]*\|?>|<[^<>\s][^<>]{0,60}>|\[[^\[\]\n]{1,60}\])"
_TAG_AT_END = re.compile(r"([<\[][^<>\[\]\s/][^<>\[\]\n]{0,60}[>\]])(\s*)\Z")
_TAG_AT_START = re.compile(r"\A(\s*)([<\[][^<>\[\]\n]{1,60}[>\]]\s*)")
_MARKS_ALONE = re.compile(rf"\s*{_MARK}\s*(?:{_MARK}\s*)*\Z")
_FIRST_MARK = re.compile(rf"\s*({_MARK})")
_MARK_AT_END = re.compile(rf"{_MARK}\Z")


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
    close = next((item.text for item in found.switches if item.closes), "")
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


def common_start(one: str, other: str) -> str:
    """The text that two texts begin with."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _opening(begun: str, user: str, openings: Iterable[str]) -> str | None:
    """What opens a thought: one tag, or, where that tag stands before every message, all that this turn has beyond a prompt."""
    tag = _TAG_AT_END.search(begun)
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
