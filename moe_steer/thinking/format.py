"""A thinking format: how a text shows where a thought begins, where it ends and what is the answer. Pure text, no tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

OUTSIDE, THOUGHT, ANSWER = 0, 1, 2
"""What a piece of a response is. Outside: neither, such as message headers, tool calls, the text before a thought."""


class Thought(NamedTuple):
    """A response in two parts, both without surrounding blanks.

    ``state``: "closed" (a thought that ends), "truncated" (a thought is still open at the end of the text), "none" (no
    thought, or no text), "empty" (the thought is blank). A truncated response has no answer.
    """

    state: str
    thought: str
    answer: str


class Switch(NamedTuple):
    """A text in a response, and what begins after it."""

    text: str
    phase: int
    closes: bool = False
    """Whether it ends a thought that no text opened: everything before it was thought."""
    pattern: str = ""
    """A regular expression for other spellings of the text."""


_TOOL_CALLS = (
    ("<tool_call>", "</tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
)
"""Messages to a tool, which may stand where an answer is expected and are none."""
_CALL_MARKS = tuple(
    Switch(text, phase) for pair in _TOOL_CALLS for text, phase in zip(pair, (OUTSIDE, ANSWER), strict=True)
)
_STOP_TOKENS = re.compile(
    r"(?:(?:<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</s>|<eos>|<sep>|<seed:eos>|\[e~\[|</assistant>|<end_of_turn>|<turn\|>)\s*)+\Z"
)
"""Stop tokens that an engine left at the end of a text."""


@dataclass(frozen=True, kw_only=True)
class ThinkingFormat:
    """How one model, under its chat template, writes thought and answer."""

    name: str
    """"none" for a model that does not think; else a name of ``known.FORMATS``, or OPEN...CLOSE as found in the template."""
    open: str = ""
    """What opens a thought, with the white space that belongs to it."""
    close: str = ""
    """What stands between thought and answer, from the end of the one to the start of the other."""
    end: str = ""
    """What the model writes after the answer, before its stop token."""
    switches: tuple[Switch, ...] = ()
    """Every text that changes what follows it."""
    starts: int = ANSWER
    """What a response is before its first switch, where the prompt opened no thought."""
    opened: bool = False
    """Whether the default prompt ends inside a thought."""
    asked: bool = True
    """Whether the default prompt lets the model think: not where thinking is switched off."""
    append: str = ""
    """Written after the template's own prompt: only for a bare template, which says nothing about thinking."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """The template's arguments that switch thinking on (or off, where the user asked for that), by name."""
    found: str = ""
    """How the format was found, in words."""

    @property
    def thinks(self) -> bool:
        """Whether responses may hold a thought."""
        return bool(self.switches)

    @property
    def closing(self) -> str:
        """What ends a thought that no text opened; "" where nothing does."""
        return next((item.text for item in self.switches if item.closes), "")

    def write(self, thought: str, answer: str) -> str:
        """What a model of this format writes after the default prompt; a model that does not think writes the answer alone."""
        if not self.thinks:
            return answer
        if not self.asked:
            return f"{self._answer_header()}{answer}{self.end}"
        return f"{'' if self.opened else self.open}{thought}{self.close}{answer}{self.end}"

    def split(self, text: str | None, prompt: str | None = None, *, opened: bool | None = None) -> Thought:
        """Thought and answer of a response: the inverse of ``write``.

        ``prompt``: the text before the response; default what the default prompt does. ``opened`` says instead whether the
        response starts inside a thought. A closing tag without an opening one ends a thought that began with the text. A
        thought may be reopened; an unmatched closing tag is ignored; a text that ends inside a thought is truncated, even if
        there was text outside before. Messages that are neither (to tools, harmony's commentary) are left out. None (no
        response) is "none" with empty parts.
        """
        if text is None:
            return Thought("none", "", "")
        if opened is None:
            opened = self.opened if prompt is None else self.opens(prompt)
        phase = THOUGHT if opened else self.starts
        seen = opened
        parts: dict[int, list[str]] = {OUTSIDE: [], THOUGHT: [], ANSWER: []}
        position = 0
        for match, item in self._found(text, phase):
            parts[phase].append(text[position : match.start()])
            position = match.end()
            if item.closes and not seen:  # the opening tag is missing: all that came before was thought
                parts[THOUGHT], parts[phase] = parts[phase], []
            seen |= item.closes or item.phase == THOUGHT
            phase = item.phase
        parts[phase].append(text[position:])
        thought = "".join(parts[THOUGHT]).strip()
        if phase == THOUGHT or (not seen and self._begins_to_open(text)):
            return Thought("truncated", thought, "")
        state = "none" if not seen else "closed" if thought else "empty"
        answer = "".join(parts[ANSWER]).strip()
        # At the end alone: all of a long text would be searched again and again.
        while stop := _STOP_TOKENS.search(answer, max(0, len(answer) - 1000)):
            answer = answer[: stop.start()].rstrip()
        return Thought(state, thought, answer)

    def opens(self, prompt: str) -> bool:
        """Whether a prompt ends right after the opening text (white space aside), so that a response starts inside a thought."""
        tail = prompt.rstrip()
        return any(
            re.search(f"(?:{item.pattern or re.escape(item.text.strip())})\\Z", tail) is not None
            for item in self.switches
            if item.phase == THOUGHT and item.text.strip()
        )

    def describe(self) -> str:
        """One line for people."""
        if not self.thinks:
            return f"this model does not think ({self.found})" if self.found else "this model does not think"
        who = "the prompt opens it" if self.opened else "the model opens it"
        with_args = ", ".join(f"{name}={value}" for name, value in self.arguments)
        asked = f"; template arguments {with_args}" if with_args else ""
        if not self.asked:
            return f"thoughts of the format {self.name}, switched off{asked} ({self.found})"
        opening, closing = (text.strip().replace("\n", "\\n") for text in (self.open, self.close))
        return f"thoughts between {opening} and {closing}, {who}{asked} ({self.found})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for run.json."""
        return {
            **dataclasses.asdict(self),
            "switches": [list(item) for item in self.switches],
            "arguments": dict(self.arguments),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ThinkingFormat:
        """The format that ``to_dict`` wrote; ValueError for anything else."""
        try:
            given = dict(values)
            switches = tuple(Switch(*item) for item in given.pop("switches"))
            return cls(switches=switches, arguments=tuple(given.pop("arguments").items()), **given)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"not a thinking format ({error}): restore run.json, or sample into another folder"
            ) from error

    def _found(self, text: str, phase: int) -> Iterator[tuple[re.Match[str], Switch]]:
        """The switches of a text, from left to right. A tool call is one in answers only: a thought may well speak of one."""
        pattern, by_group = _compiled(self.switches)
        calling = False
        for match in pattern.finditer(text):
            item = by_group[match.lastgroup or ""]
            if item in _CALL_MARKS:
                begins = item.phase == OUTSIDE
                if (begins and phase != ANSWER) or (not begins and not calling):
                    continue
                calling = begins
            phase = item.phase
            yield match, item

    def _begins_to_open(self, text: str) -> bool:
        """Whether a text is cut inside the opening text itself."""
        cut = text.strip()
        return bool(cut) and self.asked and self.open.strip() != cut and self.open.strip().startswith(cut)

    def _answer_header(self) -> str:
        """What stands before an answer without a thought: harmony names its final channel, tags have nothing."""
        return next((item.text for item in self.switches if item.phase == ANSWER), "") if self.starts == OUTSIDE else ""


@lru_cache(maxsize=64)
def _compiled(switches: tuple[Switch, ...]) -> tuple[re.Pattern[str], dict[str, Switch]]:
    """One pattern in which every switch is a named group, the longest first; and the switch of each group."""
    ordered = sorted((*switches, *_CALL_MARKS), key=lambda item: -len(item.text))
    by_group = {f"s{number}": item for number, item in enumerate(ordered)}
    pieces = (f"(?P<{group}>{item.pattern or re.escape(item.text.strip())})" for group, item in by_group.items())
    return re.compile("|".join(pieces)), by_group
