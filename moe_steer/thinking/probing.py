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
from moe_steer.thinking.known import FORMATS, NONE, named, tags
from moe_steer.thinking.templates import Messages, PromptSettings, prompt_settings, render, variables

_USER = {"role": "user", "content": "Qzqz?"}
_RR, _AA = "Rxrx", "Axax"
_SWITCH_NAMES = re.compile(r"think|reason|deliberat", re.IGNORECASE)
_NO_SWITCHES = re.compile(r"effort|budget|content|parts|text|past|history|clear|keep|preserve|drop", re.IGNORECASE)
_TAG_AT_END = re.compile(r"([<\[][^<>\[\]\s/][^<>\[\]\n]{0,60}[>\]])(\s*)\Z")
_TAG_AT_START = re.compile(r"\A(\s*)([<\[][^<>\[\]\n]{1,60}[>\]]\s*)")
_MARKS = re.compile(r"<\|[^|<>]*\|?>|<[^<>]*>|\[[^\[\]]*\]|\u25c1[^\u25b7]*\u25b7")
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
        found = self._recognised(prompt, base, on)
        if not found.thinks:
            return found
        if self._closed_by(found, prompt):
            return dataclasses.replace(found, asked=False, arguments=tuple(on.items()))
        bare = found.found.startswith("a bare template") and found.name == "think"
        return dataclasses.replace(
            found,
            opened=bare or found.opens(prompt),
            append=found.open if bare else "",
            arguments=tuple(on.items()),
        )

    def _switched_off(self, base: str, on: Arguments, off: Arguments) -> ThinkingFormat:
        found = self._recognised(self.rendered([_USER], **on) or base, base, on)
        if not off and found.thinks and not on and not self._closed_by(found, base):
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
        for name in sorted(names, key=lambda name: (name != "enable_thinking", name != "thinking", name)):
            on, off = (self.rendered([_USER], **{name: value}) for value in (True, False))
            if on is None or off is None or on == off:
                continue
            return ({} if on == base else {name: True}), ({} if off == base else {name: False})
        return {}, {}

    def _recognised(self, prompt: str, base: str, on: Arguments) -> ThinkingFormat:
        if self._asked.thinking is not None:
            return dataclasses.replace(named(self._asked.thinking), found="as asked with --thinking")
        for how, found in self._evidence(prompt, base, on):
            if found is not None:
                return dataclasses.replace(found, found=how)
        return dataclasses.replace(NONE, found="its chat template speaks of no thoughts")

    def _evidence(self, prompt: str, base: str, on: Arguments) -> Iterator[tuple[str, ThinkingFormat | None]]:
        yield "the prompt ends in its tag", self._by_prompt(prompt, base)
        yield "the template writes earlier thoughts so", self._by_history(prompt, on)
        yield "the template knows its tags", self._by_mention(prompt)
        yield "a bare template, and these tokens in the tokenizer", self._by_tokens()

    def _by_prompt(self, prompt: str, base: str) -> ThinkingFormat | None:
        for item in _known():
            close = next((s.text for s in item.switches if s.closes), None)
            if item.opens(prompt) or any(close and text.rstrip().endswith(close) for text in (prompt, base)):
                return self._with_white_space(item, prompt)
        opening = _TAG_AT_END.search(prompt)
        word = opening and re.match(r"[<\[]([^\s<>\[\]]+)", opening[1])
        if not opening or not word:
            return None
        closing = f"{opening[1][0]}/{word[1]}{opening[1][-1]}"
        known = isinstance(self._template, str) and closing in self._template
        return _new_format(opening[0], closing) if known else None

    def _by_history(self, prompt: str, on: Arguments) -> ThinkingFormat | None:
        for message in _turns_with_thought():
            text = self.rendered([_USER, message], prompt=False, **on)
            if text is None or _RR not in text or text.find(_AA) < text.find(_RR):
                continue
            before, _, rest = text.partition(_RR)
            between = rest.partition(_AA)[0]
            head = before.removeprefix(_common(before, prompt))
            return self._known_around(before, between) or _new_format(head or before, between)
        plain = self.rendered([_USER, {"role": "assistant", "content": _AA}], prompt=False, **on)
        if plain is not None and plain.partition(_AA)[0].endswith("<|channel|>final<|message|>"):
            return FORMATS["harmony"]
        return None

    def _known_around(self, before: str, between: str) -> ThinkingFormat | None:
        for item in _known():
            if item.opens(before) or any(s.closes and s.text in between for s in item.switches):
                return item
        return None

    def _by_mention(self, prompt: str) -> ThinkingFormat | None:
        """A template that takes a thought out of an earlier turn, or explains its tags to the model."""
        source = self._template if isinstance(self._template, str) else ""
        for item in _known():
            close = next((s.text for s in item.switches if s.closes), "")
            if close and (close in source or (close in prompt and item.open.strip() in prompt)):
                return item
        return None

    def _by_tokens(self) -> ThinkingFormat | None:
        """A bare template, one that treats every role alike and reads nothing else, was made by no model's author: it says
        nothing, so the tokens are the only sign."""
        if self._template and not self._is_bare():
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

    def _closed_by(self, found: ThinkingFormat, prompt: str) -> bool:
        """Whether a prompt ends in a thought that is closed already."""
        tail = prompt.rstrip()
        return any(s.closes and tail.endswith(s.text) for s in found.switches)

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


def _common(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _new_format(head: str, between: str) -> ThinkingFormat | None:
    """A format that nobody named: the tag right before the thought, and the tag right after it."""
    opening, closing = _TAG_AT_END.search(head), _TAG_AT_START.search(between)
    if not opening or not closing or opening[1] == closing[2].strip():
        return None
    open_tag, close_tag = opening[1] + opening[2], closing[1] + closing[2]
    word = re.match(r"<([^\s<>]+)\s[^<>]*>\Z", opening[1])
    pattern = f"<{re.escape(word[1])}(?:\\s[^<>\\n]*)?>" if word else ""
    return tags(f"{opening[1]}...{close_tag.strip()}", open_tag, close_tag, pattern=pattern)
