"""Marked sequences from texts: pairs of answers to a question, and a prompt against its absence."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_steer.contrasts.sequences import MarkedSequence
from moe_steer.json_files import csv_rows, decode, parse_json
from moe_steer.thinking import render, thinking_format


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
    rows: Iterable[tuple[str, str]], prompt: str, tokenizer: Any, *, chat: bool = False, joint: str = "\n"
) -> list[MarkedSequence]:
    """A contrast for a prompt: (question, answer) with the prompt before the question, and without it.

    Positive: prompt + ``joint`` + question + answer; negative: question + answer; the tokens of the answer count. With
    an empty question this is STA's form: the prompt alone against an empty turn.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give the text that is to become a direction")
    found = []
    for number, (question, answer) in enumerate(rows):
        asked = f"{prompt}{joint}{question}" if question else prompt
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
