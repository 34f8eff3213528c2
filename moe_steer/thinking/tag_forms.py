"""The token ids with which a tokenizer writes the tags of a thinking format."""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_steer.thinking.format import ANSWER, THOUGHT, ThinkingFormat
from moe_steer.thinking.probing import thinking_format

Form = tuple[int, ...]
TagForm = tuple[Form, int, bool]
"""One way in which a tag is written; what begins after it; whether it closes a thought that no tag opened."""

_BEFORE = ("", "a", " ", ".", ".\n", "\n", "\n\n", ")", "$", "}", "?", "!", "**", "]", "]\n", "4")
_AFTER = ("", "\n", "\n\n", " ", "a", "A", "4", "**", "\\", "$", "#", "(", "<", "[")
_MADE: weakref.WeakKeyDictionary[Any, dict[ThinkingFormat, TokenTags]] = weakref.WeakKeyDictionary()


class TokenTags(NamedTuple):
    """The tags of a format as token ids."""

    forms: tuple[TagForm, ...]
    """Of all tags, the longest first."""
    starts: int
    """What a response is before its first tag."""
    close: Form
    """What a model is made to write to end its thought and begin its answer."""

    def at(self, ids: Sequence[int], position: int) -> TagForm | None:
        """The tag that starts at a position of a sequence."""
        return tag_at(ids, position, self.forms)

    @classmethod
    def of_pair(cls, open_ids: Sequence[int], close_ids: Sequence[int]) -> TokenTags:
        """Of two tags that are written in one way each; ValueError for empty or equal ones."""
        if not open_ids or not close_ids or tuple(open_ids) == tuple(close_ids):
            raise ValueError(f"the tags have the ids {list(open_ids)} and {list(close_ids)}: give two different ones")
        forms = [(tuple(open_ids), THOUGHT, False), (tuple(close_ids), ANSWER, True)]
        forms.sort(key=lambda entry: (-len(entry[0]), entry[0]))
        return cls(tuple(forms), ANSWER, tuple(close_ids))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenTags:
        """What ``_asdict`` gave, back from JSON."""
        forms = tuple((tuple(form), phase, closes) for form, phase, closes in values["forms"])
        return cls(forms, values["starts"], tuple(values["close"]))

    def describe(self) -> dict[str, list[int]]:
        """The tags as a decoding rule uses them: the shortest way to open a thought, and what closes it."""
        return {"open": list(sorted((len(form), form) for form in self.opening)[0][1]), "close": list(self.close)}

    @property
    def opening(self) -> tuple[Form, ...]:
        """The forms after which a thought begins."""
        return tuple(form for form, phase, _ in self.forms if phase == THOUGHT)

    @property
    def closing(self) -> tuple[Form, ...]:
        """The forms after which a thought has ended."""
        return tuple(form for form, phase, _ in self.forms if phase != THOUGHT)

    @property
    def answering(self) -> tuple[Form, ...]:
        """The forms after which an answer begins."""
        return tuple(form for form, phase, _ in self.forms if phase == ANSWER)


def tag_at(ids: Sequence[int], position: int, forms: Sequence[TagForm]) -> TagForm | None:
    """The first of these forms that starts at a position of a sequence."""
    for entry in forms:
        form = entry[0]
        if ids[position] == form[0] and tuple(ids[position : position + len(form)]) == form:
            return entry
    return None


def token_tags(tokenizer: Any, fmt: ThinkingFormat | None = None) -> TokenTags | None:
    """The tags under a tokenizer; None for a model that does not think. ``fmt``: default as found (``thinking_format``).

    A tag that is one token has one form. A tag of several tokens has a form for each way in which it merges with its
    neighbours in some forty contexts: line ends, brackets, full stops, letters, digits.
    """
    fmt = thinking_format(tokenizer) if fmt is None else fmt
    if not fmt.thinks:
        return None
    made = _MADE.setdefault(tokenizer, {})
    if fmt not in made:
        forms = {
            form: (switch.phase, switch.closes) for switch in fmt.switches for form in forms_of(tokenizer, switch.text)
        }
        ordered = sorted(forms.items(), key=lambda item: (-len(item[0]), item[0]))
        close = tuple(tokenizer(fmt.close.strip(), add_special_tokens=False)["input_ids"])
        made[fmt] = TokenTags(tuple((form, *more) for form, more in ordered), fmt.starts, close)
    return made[fmt]


def forms_of(tokenizer: Any, text: str) -> tuple[Form, ...]:
    """The runs of tokens that write a text, alone and between neighbours with which its ends merge."""
    token_id = tokenizer.get_vocab().get(text)
    if token_id is not None and token_id != tokenizer.unk_token_id:
        return ((int(token_id),),)
    alone = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = {alone} if alone and tokenizer.unk_token_id not in alone else set()
    for before in _BEFORE:
        for after in _AFTER:
            ids = tokenizer(f"{before}{text}{after}", add_special_tokens=False)["input_ids"]
            window = shortest_with(tokenizer, ids, text)
            if window is not None and tokenizer.unk_token_id not in window:
                found.add(window)
    return tuple(sorted(found))


def shortest_with(tokenizer: Any, ids: list[int], text: str) -> Form | None:
    """The shortest run of tokens whose text contains ``text``; None where no run does."""

    def holds(start: int, stop: int) -> bool:
        part = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text in part

    if not holds(0, len(ids)):
        return None
    start, stop = 0, len(ids)
    while stop > 1 and holds(0, stop - 1):
        stop -= 1
    while start < stop - 1 and holds(start + 1, stop):
        start += 1
    return tuple(ids[start:stop])


def token_texts(tokenizer: Any) -> tuple[str, ...]:
    """The text of every token by itself."""
    ids = [[token_id] for token_id in range(len(tokenizer))]
    return tuple(tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_spans(texts: Sequence[str], tag: str) -> list[tuple[int, int]]:
    """Where a tag stands in tokens of these texts: (first token, token after the last), from left to right.

    >>> text_spans(["hi.\\n</", "think", ">\\n\\n", "4"], "</think>")
    [(0, 3)]
    """
    starts = list(itertools.accumulate(map(len, texts), initial=0))
    whole = "".join(texts)
    found = []
    place = whole.find(tag)
    while place >= 0:
        end = place + len(tag)
        found.append((bisect.bisect_right(starts, place) - 1, bisect.bisect_left(starts, end)))
        place = whole.find(tag, end)
    return found
