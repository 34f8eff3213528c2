"""How a model thinks, found by trying its chat template: with its switches on and off, and with a history that has a thought.

The name of the model is never looked at. What counts, in this order: the tag in which the prompt ends, the texts around the
thought of an earlier turn, the tags that the template takes out of an earlier turn or speaks of, and, for a template that
says nothing at all, the tokens of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from moe_steer.thinking.format import ANSWER, ThinkingFormat
from moe_steer.thinking.known import FORMATS, NONE, TAG_AT_END, Turn, closings_of, named, read_turn, with_answer_marks
from moe_steer.thinking.templates import (
    Messages,
    PromptSettings,
    effort_name,
    prompt_settings,
    render,
    template_text,
    variables,
)

_USER = {"role": "user", "content": "Qzqz?"}
_RR, _AA = "Rxrx", "Axax"
_SWITCH_NAMES = re.compile(r"think|reason|deliberat", re.IGNORECASE)
_NO_SWITCHES = re.compile(
    r"effort|strength|budget|content|parts|text|past|history|clear|keep|preserve|drop", re.IGNORECASE
)
_TURNS_OFF = re.compile(r"(?:skip|no|disable)_", re.IGNORECASE)
_SWITCH_VALUES: tuple[tuple[bool | str, bool | str], ...] = (
    (True, False),
    ("enabled", "disabled"),
    ("on", "off"),
    ("thinking", "chat"),
)
_EFFORTS_ON, _EFFORTS_OFF = ("high", "medium", "low"), ("none", "no_think", "minimal", "low")
_MARKS = re.compile(r"<\|[^|<>]*\|?>|<[^<>]*>|\[[^\[\]]*\]|\u25c1[^\u25b7]*\u25b7")
_REPRESENTED = re.compile(r"['\"]type['\"]: ")
"""Blocks of content that a template wrote as the list they are."""
_BARE = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})
_FOUND: weakref.WeakKeyDictionary[Any, dict[Any, ThinkingFormat]] = weakref.WeakKeyDictionary()

Arguments = Mapping[str, Any]


def thinking_format(tokenizer: Any) -> ThinkingFormat:
    """The thinking format of a tokenizer's model, under its chat template and what the user asked (``use_prompt_settings``).

    ``none`` where nothing speaks of thoughts, and for a tokenizer without a template. ValueError where the user asked for what
    cannot be had: no thinking from a template that has no switch for it, an unknown format.
    """
    asked = prompt_settings(tokenizer)
    key = (str(getattr(tokenizer, "chat_template", None)), repr(asked))
    known = _FOUND.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _Probe(tokenizer, asked).format()
    return known[key]


def thinking_off(tokenizer: Any) -> dict[str, Any]:
    """The template's arguments that switch thinking off; empty where there is no such switch, or nothing to switch."""
    probe = _Probe(tokenizer, prompt_settings(tokenizer))
    base = probe.rendered([_USER])
    return {} if base is None else dict(probe.switches(base)[1])


class _Probe:
    """The tries of one template."""

    def __init__(self, tokenizer: Any, asked: PromptSettings) -> None:
        self._tokenizer = tokenizer
        self._asked = asked
        self._template = getattr(tokenizer, "chat_template", None)

    def format(self) -> ThinkingFormat:
        if not self._template:
            shown = named(self._asked.thinking) if self._asked.thinking else self._by_tokens() or NONE
            return dataclasses.replace(shown, found="there is no chat template; by the tokens of the tokenizer")
        base = self.rendered([_USER])
        if base is None:
            return dataclasses.replace(NONE, found="its chat template cannot be rendered")
        on, off = self.switches(base)
        if self._asked.no_thinking:
            return self._switched_off(base, on, off)
        prompt = self.rendered([_USER], **on) or base
        found = self._recognised(prompt, base, on, off)
        if not found.thinks:
            return found if not on and not off else self._switched_without_tags(prompt, on)
        if self._closed_by(found, prompt, on):
            return dataclasses.replace(found, asked=False, arguments=tuple(on.items()))
        bare = found.found.startswith("a bare template") and found.name == "think"
        return dataclasses.replace(
            found,
            opened=bare or found.opens(prompt),
            append=found.open if bare else "",
            arguments=tuple(on.items()),
        )

    def _switched_without_tags(self, prompt: str, on: Arguments) -> ThinkingFormat:
        """A template that has a switch and names no tags (Cogito): nearly all models of that kind write <think>."""
        found = self._by_tokens(asked_of_any=True) or FORMATS["think"]
        how = "the template has a switch for thinking, and names no tags"
        return dataclasses.replace(found, opened=found.opens(prompt), arguments=tuple(on.items()), found=how)

    def _switched_off(self, base: str, on: Arguments, off: Arguments) -> ThinkingFormat:
        found = self._recognised(self.rendered([_USER], **on) or base, base, on, off)
        if not off and found.thinks and not on and not self._closed_by(found, base, {}):
            raise ValueError(
                "--no-thinking: this chat template has no switch that turns thinking off; "
                "give one with --template-arg NAME=VALUE, or words for the model with --system"
            )
        return dataclasses.replace(found, asked=False, opened=False, arguments=tuple(off.items()))

    def switches(self, base: str) -> tuple[Arguments, Arguments]:
        """The arguments that turn thinking on, and off; empty where the template does so by itself."""
        names = [n for n in variables(self._tokenizer) if _SWITCH_NAMES.search(n) and not _NO_SWITCHES.search(n)]
        if set(names) & set(self._asked.arguments):
            return {}, {}  # the user has decided
        on: dict[str, Any] = {}
        off: dict[str, Any] = {}
        changes = False
        for name in sorted(names, key=lambda name: (name != "enable_thinking", name != "thinking", name)):
            for values in _SWITCH_VALUES:
                yes, no = reversed(values) if _TURNS_OFF.match(name) else values
                with_it, without, other = (self.with_arguments({name: value}) for value in (yes, no, "Vzvz"))
                if with_it is None or without is None or with_it == without or "Vzvz" in (other or ""):
                    continue
                if not changes:
                    on, off = ({} if with_it == base else {name: yes}), ({} if without == base else {name: no})
                elif not off and with_it == base:  # one name turns thinking on, another off
                    off = {name: no}
                changes = True
                break
        if changes:
            return on, off
        return self._efforts(base)

    def _efforts(self, base: str) -> tuple[Arguments, Arguments]:
        """The same, for a template that switches thinking by words for how hard to think: Hunyuan 3, Solar."""
        name = effort_name(self._tokenizer)
        if name is None or self._asked.effort is not None or name in self._asked.arguments:
            return {}, {}
        found = self._recognised(base, base, {}, {})
        if not found.thinks:
            return {}, {}
        closed = self._closed_by(found, base, {})
        for word in _EFFORTS_ON if closed else _EFFORTS_OFF:
            prompt = self.with_arguments({name: word})
            if prompt is not None and closed != self._closed_by(found, prompt, {name: word}):
                return ({name: word}, {}) if closed else ({}, {name: word})
        return {}, {}

    def _recognised(self, prompt: str, base: str, on: Arguments, off: Arguments) -> ThinkingFormat:
        if self._asked.thinking is not None:
            return dataclasses.replace(named(self._asked.thinking), found="as asked with --thinking")
        turn = self._turn(on)
        for how, found in self._evidence(prompt, base, on, off, turn):
            if found is not None:
                found = found if turn is None else with_answer_marks(found, turn)
                return dataclasses.replace(found, found=how)
        return dataclasses.replace(NONE, found="its chat template speaks of no thoughts")

    def _evidence(
        self, prompt: str, base: str, on: Arguments, off: Arguments, turn: Turn | None
    ) -> Iterator[tuple[str, ThinkingFormat | None]]:
        yield "the prompt ends in its tag", self._by_prompt(prompt, base)
        yield "the template writes earlier thoughts so", self._by_history(turn, on, off)
        yield "the template knows its tags", self._by_mention(prompt)
        yield "a bare template, and these tokens in the tokenizer", self._by_tokens()

    def _by_prompt(self, prompt: str, base: str) -> ThinkingFormat | None:
        for item in _known():
            close = item.closing
            if item.opens(prompt) or any(close and text.rstrip().endswith(close) for text in (prompt, base)):
                return self._with_white_space(item, prompt)
        opening = TAG_AT_END.search(prompt)
        closing = self._closing(opening[1]) if opening else None
        if not opening or closing is None:
            return None
        plain = self.rendered([_USER, {"role": "assistant", "content": _AA}], prompt=False) or ""
        before, _, after = plain.partition(_AA)
        if before.rstrip().endswith(opening[1]) and after.lstrip().startswith(closing):
            return None  # tags around every turn: <assistant>...</assistant>
        return read_turn(Turn(prompt, closing, ""))

    def _closing(self, opening: str) -> str | None:
        """The tag that closes what this one opens, by its name: the template knows it, or, of thoughts, the tokenizer does."""
        places = [template_text(self._tokenizer), self._tokenizer.get_vocab() if _SWITCH_NAMES.search(opening) else ""]
        return next((one for place in places for one in closings_of(opening) if one in place), None)

    def _turn(self, on: Arguments) -> Turn | None:
        """What the template writes around the thought and the answer of an earlier turn; None where it leaves thoughts out."""
        for message in _turns_with_thought():
            text = self.rendered([_USER, message], prompt=False, **on)
            if text is not None and -1 < text.find(_RR) < text.find(_AA) and not _REPRESENTED.search(text):
                before, _, rest = text.partition(_RR)
                between, _, after = rest.partition(_AA)
                return Turn(before, between, after)
        return None

    def _by_history(self, turn: Turn | None, on: Arguments, off: Arguments) -> ThinkingFormat | None:
        if turn is not None:
            openings = [self._opening(arguments) for arguments in (on, {}, off)]
            user = self.rendered([_USER], prompt=False, **on) or ""
            return self._known_around(turn) or read_turn(turn, user, openings)
        plain = self.rendered([_USER, {"role": "assistant", "content": _AA}], prompt=False, **on)
        if plain is not None and plain.partition(_AA)[0].endswith("<|channel|>final<|message|>"):
            return FORMATS["harmony"]
        return None

    def _known_around(self, turn: Turn) -> ThinkingFormat | None:
        for item in _known():
            if item.opens(turn.before) or any(s.closes and s.text in turn.between for s in item.switches):
                return item
        return None

    def _by_mention(self, prompt: str) -> ThinkingFormat | None:
        """A template that takes a thought out of an earlier turn, or explains its tags to the model. What it tells the model says
        more than what it only knows: those tags may be for calls of tools."""
        source = template_text(self._tokenizer)
        all_of_them = [item for item in _known() if item.closing]
        known = [item for item in all_of_them if item.closing in source]
        told = [item for item in known if item.closing in prompt]
        by_user = [item for item in all_of_them if item.closing in prompt and item.open.strip() in prompt]
        return next(iter((*told, *known, *by_user)), None)

    def _by_tokens(self, asked_of_any: bool = False) -> ThinkingFormat | None:
        """A bare template, one that treats every role alike and reads nothing else, was made by no model's author: it says
        nothing, so the tokens are the only sign."""
        if self._template and not asked_of_any and not self._is_bare():
            return None
        vocabulary = self._tokenizer.get_vocab()
        for item in sorted(
            _known(), key=lambda item: item.name == "think"
        ):  # the commonest last: rarer tokens say more
            marks = [mark for s in item.switches for mark in _MARKS.findall(s.text.strip())]
            signs = [mark for mark in marks if mark not in ("<|call|>", "<|return|>")]
            if signs and all(mark in vocabulary for mark in signs):
                return item
        return None

    def _is_bare(self) -> bool:
        if not variables(self._tokenizer) <= _BARE:
            return False
        odd = self.rendered([{"role": "qwvrole", "content": _USER["content"]}])
        return odd is not None and odd.replace("qwvrole", "user") == self.rendered([_USER])

    def _with_white_space(self, item: ThinkingFormat, prompt: str) -> ThinkingFormat:
        """White space as the template itself writes it after its opening tag."""
        if not item.opens(prompt) or item.starts != ANSWER or not item.open.startswith("<think"):
            return item
        space = prompt[len(prompt.rstrip()) :]
        return dataclasses.replace(
            item, open=item.open.rstrip() + space, close=item.close if space else item.close.strip()
        )

    def _closed_by(self, found: ThinkingFormat, prompt: str, on: Arguments) -> bool:
        """Whether a prompt ends behind a thought that is closed already, or in what opens an answer."""
        tail = prompt.rstrip()
        if any(s.phase == ANSWER and s.text and tail.endswith(s.text) for s in found.switches):
            return True
        return found.split(self._opening(on), opened=False).state in ("empty", "closed")

    def _opening(self, arguments: Arguments) -> str:
        """What a prompt writes to open the assistant's turn."""
        prompt, user = (self.rendered([_USER], prompt=prompt, **arguments) for prompt in (True, False))
        return prompt.removeprefix(user) if prompt and user and prompt.startswith(user) else ""

    def with_arguments(self, arguments: Arguments) -> str | None:
        return self.rendered([_USER], **arguments)

    def rendered(self, messages: Messages, prompt: bool = True, **arguments: Any) -> str | None:
        try:
            return render(self._tokenizer, messages, prompt=prompt, **arguments)
        except ValueError:
            return None


def _known() -> list[ThinkingFormat]:
    return [item for item in FORMATS.values() if item.thinks]


def _turns_with_thought() -> Iterator[dict[str, Any]]:
    """An earlier turn of the assistant, in the forms in which templates take its thought."""
    for key in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts"):
        yield {"role": "assistant", "content": _AA, key: _RR}
    for thought in (_RR, [{"type": "text", "text": _RR}]):
        blocks = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": _AA}]
        yield {"role": "assistant", "content": blocks}
    yield {
        "role": "assistant",
        "content": {"blocks": [{"type": "thoughts", "text": _RR}, {"type": "response", "text": _AA}]},
    }
