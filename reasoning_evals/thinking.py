"""Token counts of thought and answer; and how much of a response repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_steer.thinking import ANSWER, THOUGHT, Thought, TokenTags, read_from_text

__all__ = [
    "Loop",
    "Thought",
    "TokenCounts",
    "count_tokens",
    "longest_repeat",
    "loop_at_end",
    "split_thought",
    "token_phases",
]

_MODULUS = (1 << 61) - 1
_BASE = 1_000_003


def split_thought(text: str | None, opened: bool = False) -> Thought:
    """Thought and answer of a text of which nothing else is known, by the tags that it shows (``read_from_text``).

    ``opened`` says that the prompt already ended inside the thought, as the templates of R1 do. Where the model is known,
    ``thinking_format(tokenizer).split`` reads its texts.

    >>> split_thought("<think>2 + 2</think>4")
    Thought(state='closed', thought='2 + 2', answer='4')
    >>> split_thought("2 + 2 is \\\\boxed{4}, or", opened=True).state
    'truncated'
    """
    return read_from_text(text, opened).split(text, opened=opened)


class TokenCounts(NamedTuple):
    """Tags and the stop token count in the total only, so thinking + answer <= total."""

    thinking: int
    answer: int
    total: int


def count_tokens(token_ids: Sequence[int], opened: bool, tags: TokenTags, stopped: bool) -> TokenCounts:
    """Count by the rules of ``ThinkingFormat.split``: a thought may be reopened, and a closing tag without an opening one ends
    a thought that began with the text.

    opened: the prompt ended inside the thought. stopped: the last id is the stop token.

    >>> tags = TokenTags(forms=(((3,), THOUGHT, False), ((2,), ANSWER, True)), starts=ANSWER, close=(2,))
    >>> count_tokens([5, 6, 7, 2, 8, 1], opened=True, tags=tags, stopped=True)
    TokenCounts(thinking=3, answer=1, total=6)
    """
    phases = token_phases(token_ids[: len(token_ids) - stopped], opened, tags)
    return TokenCounts(phases.count(THOUGHT), phases.count(ANSWER), len(token_ids))


def token_phases(token_ids: Sequence[int], opened: bool, tags: TokenTags) -> list[int]:
    """What each token belongs to, by the same rules: THOUGHT, ANSWER, OUTSIDE; -1 for those of a tag.

    >>> tags = TokenTags(forms=(((3,), THOUGHT, False), ((2,), ANSWER, True)), starts=ANSWER, close=(2,))
    >>> token_phases([5, 2, 8], opened=False, tags=tags) == [THOUGHT, -1, ANSWER]
    True
    """
    ids = tuple(token_ids)
    firsts = {form[0] for form, _, _ in tags.forms}
    phase = THOUGHT if opened else tags.starts
    seen = opened
    phases: list[int] = []
    while len(phases) < len(ids):
        position = len(phases)
        found = tags.at(ids, position) if ids[position] in firsts else None
        if found is None:
            phases.append(phase)
            continue
        form, after, closes = found
        if closes and not seen:
            phases = [THOUGHT if one == phase else one for one in phases]
        seen |= closes or after == THOUGHT
        phase = after
        phases += [-1] * len(form)
    return phases


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
