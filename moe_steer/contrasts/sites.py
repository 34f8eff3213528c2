"""Marked sequences: from texts (pairs of answers to a question, a prompt against its absence) and from traces (the decision to stop a thought
or to continue it, concise against verbose thoughts).
"""

from __future__ import annotations

import functools
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_steer.contrasts.sequences import MarkedSequence
from moe_steer.json_files import csv_rows, decode, parse_json
from moe_steer.thinking import render, thinking_format
from moe_steer.tokens import MarkerSet, Trace


def answer_pairs(
    rows: Iterable[tuple[str, str, str]],
    tokenizer: Any,
    *,
    chat: bool = False,
    tokens: slice = slice(None),
    match_lengths: bool = False,
) -> list[MarkedSequence]:
    """(question, matching answer, not matching answer) as pairs; all tokens of the answers count.

    ``chat``: the question goes into a user turn of the tokenizer's chat template, up to where the model starts to write;
    otherwise the answer follows the question directly, with a space if it does not begin with one, as in STA's data. Which
    tokens belong to the answer is read from character offsets: a token that holds any character of it does. ``tokens``:
    only this slice of an answer's tokens, slice(-2, -1) for the last letter of a multiple choice "(A)". ``match_lengths``:
    of both answers only as many as the shorter one has. ValueError for a tokenizer without offsets.
    """
    found = []
    for number, (question, matching, not_matching) in enumerate(rows):
        prefix = _prefix(tokenizer, question, chat)
        sides = [_encode(tokenizer, prefix, answer, chat) for answer in (matching, not_matching)]
        spans = [span[tokens] for _, span in sides]
        if match_lengths:
            shortest = min(map(len, spans))
            spans = [span[:shortest] for span in spans]
        found += _pair(str(number), (sides[0][0], sides[1][0]), (spans[0], spans[1]))
    return found


def prompt_pairs(
    rows: Iterable[tuple[str, str]], prompt: str, tokenizer: Any, *, chat: bool = False
) -> list[MarkedSequence]:
    """A contrast for a prompt: (question, answer) with the prompt before the question, and without it.

    Positive: prompt + newline + question + answer; negative: question + answer; the tokens of the answer count. With
    an empty question this is STA's form: the prompt alone against an empty turn.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give the text that is to become a direction")
    found = []
    for number, (question, answer) in enumerate(rows):
        asked = f"{prompt}\n{question}" if question else prompt
        sides = [_encode(tokenizer, _prefix(tokenizer, text, chat), answer, chat) for text in (asked, question)]
        found += _pair(str(number), (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1]))
    return found


def read_rows(path: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Rows of a CSV file with a header, or of JSON lines; ValueError names the line in which a column is missing."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path!r}: give CSV or JSON lines with {', '.join(columns)}")
    text = decode(file.read_bytes().removeprefix(BOM_UTF8), repr(path))  # spreadsheets write the mark
    if file.suffix == ".csv":
        records: list[Any] = [row for _, row in csv_rows(text, path)]
    else:
        lines = enumerate(text.split("\n"), 1)
        records = [parse_json(line, f"{path}, line {n}", "give one object a line") for n, line in lines if line.strip()]
    rows: list[tuple[str, ...]] = []
    for number, record in enumerate(records, 1):
        given = record if isinstance(record, Mapping) else {}
        values = [given[column] for column in columns if isinstance(given.get(column), str)]
        if len(values) < len(columns):
            raise ValueError(f"{path}, record {number} has no text for {', '.join(columns)}: all of them are needed")
        rows.append(tuple(values))
    if not rows:
        raise ValueError(f"{path!r} holds no records: give CSV or JSON lines with {', '.join(columns)}")
    return rows


def _prefix(tokenizer: Any, question: str, chat: bool) -> str:
    if not chat:
        return question
    turn = [{"role": "user", "content": question}]
    return render(tokenizer, turn, **dict(thinking_format(tokenizer).arguments))


def _encode(tokenizer: Any, prefix: str, answer: str, chat: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(token ids, positions of the answer). A chat template writes its own special tokens, so the tokenizer adds none."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: use a fast tokenizer, so that the answer's start is known"
        )
    space = "" if chat or not answer or answer[0].isspace() else " "
    encoded = tokenizer(f"{prefix}{space}{answer}", add_special_tokens=not chat, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    border, end = len(prefix), len(prefix) + len(space) + len(answer)
    marked = [
        position
        for position, (start, stop) in enumerate(encoded["offset_mapping"])
        if border < stop <= end and stop > start
    ]
    return ids, tuple(marked)


def _pair(
    name: str, ids: tuple[tuple[int, ...], tuple[int, ...]], spans: tuple[tuple[int, ...], tuple[int, ...]]
) -> list[MarkedSequence]:
    return [
        MarkedSequence(f"{name}+", ids[0], positive=spans[0], pair=name),
        MarkedSequence(f"{name}-", ids[1], negative=spans[1], pair=name),
    ]


__all__ = ["MarkedSequence", "answer_pairs", "concise_and_verbose", "decision_sites", "prompt_pairs", "thought_pairs"]

SWITCH_WORDS = ("Wait", "Alternatively", "Hmm")
_STEP_ENDS = (".", "!", "?", "\n")
_LEADS = frozenset(
    [
        "but",
        "so",
        "no",
        "and",
        "oh",
        "or",
        "well",
        "now",
        "okay",
        "ok",
        "yes",
        "yeah",
        "hmm",
        "wait",
        "actually",
        "then",
    ]
)


def decision_sites(
    traces: Iterable[Trace],
    tokenizer: Any,
    switch_words: Sequence[str] = SWITCH_WORDS,
    *,
    closed_only: bool = True,
    require_both: bool = False,
    after: str | None = None,
) -> list[MarkedSequence]:
    """The decision to stop or to continue, from ordinary solutions: no pairs are needed.

    Positive: the position just before `</think>`, where the thought is about to stop. Negative: the positions just before a
    switch word (whole, in all its token forms, first letter in either case) at the start of a step: not at the start of the
    thought, and the token before them must end in ".", "!", "?" or a line break. Words that lead up to a switch ("But wait",
    "No, wait", "So, alternatively") belong to it: the position is the one before them. So a direction's POSITIVE strength
    means "stop thinking": shorter thoughts.

    ``closed_only``: leave out traces whose thought was never closed, where loops would outweigh all else.
    ``after``: only positions at which the text so far ends in these words, such as "wrong."; what is decided after a failure
    is another thing than what is decided after a success.
    ``require_both``: leave out traces without a switch word as well. Traces without a thought give nothing. Collect
    with weight="token" to let every decision count once. ValueError when the tokenizer cannot write a switch word.
    """
    markers = MarkerSet.from_tokenizer(tokenizer, tuple(switch_words))
    texts = functools.cache(functools.partial(token_text, tokenizer))
    found = []
    for trace in traces:
        end = trace.thought_end
        if trace.thought_start is None or (closed_only and end is None):
            continue
        stop = len(trace.token_ids) if end is None else end
        start = _first(trace)
        while start < stop and not texts(trace.token_ids[start]).strip():
            start += 1  # the line break with which some templates and models open a thought
        spans = [span for group in markers.find_occurrences(trace.token_ids).values() for span in group]
        before = {before_lead(trace.token_ids, span.start - 1, texts) for span in spans if start < span.start < stop}
        ends = (place for place in before if place >= start and _ends_step(texts(trace.token_ids[place])))
        negative = tuple(sorted(ends))
        positive: tuple[int, ...] = () if end is None or end <= start else (end - 1,)
        if after is not None:
            positive, negative = (
                tuple(place for place in side if _is_after(after, trace.token_ids, place, tokenizer))
                for side in (positive, negative)
            )
        if (positive and negative) or ((positive or negative) and not require_both):
            found.append(MarkedSequence(trace.trace_id, trace.token_ids, positive, negative))
    return found


def thought_pairs(
    pairs: Iterable[tuple[Trace, Trace]], *, tokens: slice = slice(None), match_lengths: bool = False
) -> list[MarkedSequence]:
    """(concise, verbose) thoughts of the same problems, best both correct, as pairs; concise is the positive side.

    The tokens of the thought count, without its tags; ``tokens``: only this slice of them, such as slice(50) for the first
    50. ``match_lengths``: only as many tokens of both thoughts as the shorter one has, so that the contrast is not about
    length. ValueError for a trace without a closed thought.
    """
    found = []
    for number, (concise, verbose) in enumerate(pairs):
        spans = [_thought(trace)[tokens] for trace in (concise, verbose)]
        if match_lengths:
            shortest = min(map(len, spans))
            spans = [span[:shortest] for span in spans]
        pair = f"{number}:{concise.trace_id}"
        found.append(MarkedSequence(f"{pair}+", concise.token_ids, positive=tuple(spans[0]), pair=pair))
        found.append(MarkedSequence(f"{pair}-", verbose.token_ids, negative=tuple(spans[1]), pair=pair))
    return found


def _thought(trace: Trace) -> range:
    if trace.thought_start is None or trace.thought_end is None:
        raise ValueError(f"trace {trace.trace_id!r} has no closed thought: leave it out of the pairs")
    return range(_first(trace), trace.thought_end)


def _first(trace: Trace) -> int:
    """The first token of the thought that the model wrote: templates may open the thought with the tag and a line
    break."""
    assert trace.thought_start is not None
    return max(trace.thought_start, trace.prompt_length)


def token_text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _is_after(words: str, ids: Sequence[int], place: int, tokenizer: Any) -> bool:
    """Whether the text up to ``place`` ends in the words; a character is at most four tokens."""
    first = max(0, place + 1 - 4 * len(words) - 4)
    text: str = tokenizer.decode(ids[first : place + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip().endswith(words.strip())


def before_lead(ids: Sequence[int], place: int, texts: Callable[[int], str]) -> int:
    """The position before the words that lead up to what follows ``place``: at most three of them, with their commas."""
    words = 0
    while place > 0 and words < 3:
        text = texts(ids[place]).strip(" *")
        if text.rstrip(",").lower() not in _LEADS and text != ",":
            break
        words += text != ","
        place -= 1
    return place


def _ends_step(text: str) -> bool:
    """Whether a token ends a sentence or a line, by its own text: a switch word follows, so no digit does."""
    return text.rstrip(" )]\"'*$").endswith(_STEP_ENDS)


def concise_and_verbose(traces: Iterable[Trace], *, min_ratio: float = 1.5) -> list[tuple[Trace, Trace]]:
    """Of the samples of each problem (the part of a trace_id before the last "#") the shortest and the longest
    closed thought, where the longest has ``min_ratio`` times as many tokens or more. The caller selects the correct traces."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        if trace.thought_start is not None and trace.thought_end is not None and len(_thought(trace)):
            groups.setdefault(trace.trace_id.rpartition("#")[0] or trace.trace_id, []).append(trace)
    pairs = []
    for group in groups.values():
        ordered = sorted(group, key=lambda trace: (len(_thought(trace)), trace.trace_id))
        if len(ordered) > 1 and len(_thought(ordered[-1])) >= min_ratio * len(_thought(ordered[0])):
            pairs.append((ordered[0], ordered[-1]))
    return pairs
