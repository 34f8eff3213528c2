"""Thought and answer of a response: split in its text, counted in its token ids; and how much of it repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"
STATES = ("closed", "truncated", "none", "empty")

_MODULUS = (1 << 61) - 1
_BASE = 1_000_003


class Thought(NamedTuple):
    """A response in two parts, both without surrounding blanks.

    ``state``: "closed" (a thought that ends), "truncated" (a thought is still open at the end of the text), "none" (no tag,
    or no text), "empty" (the thought is blank). A truncated response has no answer.
    """

    state: str
    thought: str
    answer: str


def split_thought(
    text: str | None, opened: bool = False, open_tag: str = OPEN_TAG, close_tag: str = CLOSE_TAG
) -> Thought:
    """Split a generated text into thought and answer.

    ``opened`` says that the prompt already ended inside the thought, as the templates of R1 do. A closing tag without an
    opening one ends a thought that began with the text. A thought may be reopened: everything inside tags is thought,
    everything outside is answer, an unmatched closing tag is ignored, and a text that ends inside a thought is truncated,
    even if there was text outside before. None (no response) is "none" with empty parts.

    >>> split_thought("<think>2 + 2</think>4")
    Thought(state='closed', thought='2 + 2', answer='4')
    >>> split_thought("2 + 2 is \\\\boxed{4}, or", opened=True).state
    'truncated'
    """
    if text is None:
        return Thought("none", "", "")
    inside, tagged, closed = opened, opened, False
    thought: list[str] = []
    answer: list[str] = []
    position = 0
    for match in _tags(open_tag, close_tag).finditer(text):
        (thought if inside else answer).append(text[position : match.start()])
        position = match.end()
        tagged = True
        if match.group() == open_tag:
            inside = True
            continue
        if not inside and not closed:  # the opening tag is missing: all that came before was thought
            thought, answer = answer, []
        inside, closed = False, True
    (thought if inside else answer).append(text[position:])
    inner = "".join(thought).strip()
    if inside:
        return Thought("truncated", inner, "")
    state = "none" if not tagged else "closed" if inner else "empty"
    return Thought(state, inner, "".join(answer).strip())


@lru_cache(maxsize=16)
def _tags(open_tag: str, close_tag: str) -> re.Pattern[str]:
    if not open_tag or not close_tag or open_tag == close_tag:
        raise ValueError(f"open_tag {open_tag!r} and close_tag {close_tag!r} must be two different texts")
    return re.compile(f"{re.escape(open_tag)}|{re.escape(close_tag)}")


class TokenCounts(NamedTuple):
    """Tags and the stop token count in the total only, so thinking + answer <= total."""

    thinking: int
    answer: int
    total: int


def count_tokens(
    token_ids: Sequence[int], opened: bool, open_ids: Sequence[int], close_ids: Sequence[int], stopped: bool
) -> TokenCounts:
    """Count by the rules of ``split_thought``: a thought may be reopened, and a closing tag without an opening one ends a
    thought that began with the text.

    opened: the prompt ended inside the thought. stopped: the last id is the stop token.

    >>> count_tokens([5, 6, 7, 2, 8, 1], opened=True, open_ids=[3], close_ids=[2], stopped=True)
    TokenCounts(thinking=3, answer=1, total=6)
    """
    ids = tuple(token_ids[:-1] if stopped else token_ids)
    inside, closed = opened, False
    thinking = answer = position = 0
    while position < len(ids):
        if _starts(ids, position, open_ids):
            inside = True
            position += len(open_ids)
        elif _starts(ids, position, close_ids):
            if not inside and not closed:
                thinking, answer = thinking + answer, 0
            inside, closed = False, True
            position += len(close_ids)
        else:
            thinking += inside
            answer += not inside
            position += 1
    return TokenCounts(thinking, answer, len(token_ids))


def _starts(ids: tuple[int, ...], position: int, tag: Sequence[int]) -> bool:
    return bool(tag) and ids[position] == tag[0] and ids[position : position + len(tag)] == tuple(tag)


class Loop(NamedTuple):
    """A loop at the end of a sequence: the last ``length`` tokens repeat with the given ``period``. Both are 0 without a loop."""

    period: int
    length: int


def loop_at_end(token_ids: Sequence[int], copies: int = 3, min_tokens: int = 30) -> Loop:
    """The longest ending that repeats the same tokens at least ``copies`` times and has at least ``min_tokens`` tokens.

    Linear, from the failure function of Knuth, Morris and Pratt over the reversed sequence.

    >>> loop_at_end([9, 1, 2, 1, 2, 1, 2], min_tokens=4)
    Loop(period=2, length=6)
    """
    if copies < 2 or min_tokens < 1:
        raise ValueError(f"copies is {copies} and min_tokens {min_tokens}: expected at least 2 and 1")
    reversed_ids = token_ids[::-1]
    failure = [0] * len(reversed_ids)
    best = Loop(0, 0)
    border = 0
    for index in range(len(reversed_ids)):
        while index and border and reversed_ids[index] != reversed_ids[border]:
            border = failure[border - 1]
        if index and reversed_ids[index] == reversed_ids[border]:
            border += 1
        failure[index] = border
        length, period = index + 1, index + 1 - border
        if border and length >= copies * period and length >= min_tokens:
            best = Loop(period, length)
    return best


def longest_repeat(token_ids: Sequence[int]) -> int:
    """Length of the longest stretch of tokens that occurs twice (the two may overlap).

    Binary search over the length with rolling hashes, every match checked token by token: n log n.

    >>> longest_repeat([1, 2, 3, 4, 1, 2, 3, 5])
    3
    """
    ids = list(token_ids)
    low, high = 0, max(0, len(ids) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _occurs_twice(ids, middle) else (low, middle - 1)
    return low


def _occurs_twice(ids: list[int], length: int) -> bool:
    lead = pow(_BASE, length, _MODULUS)
    value = 0
    seen: dict[int, int] = {}
    for index, token in enumerate(ids):
        value = (value * _BASE + token + 1) % _MODULUS
        if index >= length:
            value = (value - (ids[index - length] + 1) * lead) % _MODULUS
        if index >= length - 1:
            start = index - length + 1
            earlier = seen.setdefault(value, start)
            if earlier != start and ids[earlier : earlier + length] == ids[start : index + 1]:
                return True
    return False
