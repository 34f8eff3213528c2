"""Trace records: the token ids of a prompt and its response, and the position of the thought. Stored as JSON lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.files import written_aside
from moe_steer.json_files import NotJSON, parse_json, quoted
from moe_steer.thinking import THOUGHT, TokenTags, tag_at

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trace:
    """One prompt with one response.

    ``token_ids`` contains both; the first ``prompt_length`` are the prompt. ``thought_start`` is the first token after the
    opening tag (the tag may be in the prompt), ``thought_end`` the closing tag itself, so that the thought is
    ``token_ids[thought_start:thought_end]``; None without a thought, or when it was never closed. Samples of one problem
    are named "problem#0", "problem#1", ...: the part before the last "#" keeps them in one group when uncertainty is
    computed.
    """

    trace_id: str
    token_ids: tuple[int, ...]
    prompt_length: int
    thought_start: int | None = None
    thought_end: int | None = None
    family: str | None = None
    """The domain of the problem (a task, a subject), where agreement between domains is asked for."""

    @property
    def prompt_digest(self) -> str:
        """Of the prompt's tokens: the same for the same problem, asked in the same words, in any run."""
        return hashlib.sha256(repr(self.token_ids[: self.prompt_length]).encode()).hexdigest()[:12]

    def __post_init__(self) -> None:
        if not isinstance(self.trace_id, str) or not self.trace_id:
            raise ValueError(f"trace_id is {quoted(self.trace_id)}: give a non-empty text")
        if self.family is not None and not isinstance(self.family, str):
            raise ValueError(
                f"family of trace {quoted(self.trace_id)} is {quoted(self.family)}: give a text, or leave it out"
            )
        object.__setattr__(self, "token_ids", _whole_numbers(self.token_ids, self.trace_id))
        if not self.token_ids:
            raise ValueError(f"trace {quoted(self.trace_id)} has no tokens: leave it out")
        self._check_index("prompt_length", self.prompt_length)
        if self.thought_start is not None:
            self._check_index("thought_start", self.thought_start)
        if self.thought_end is not None:
            self._check_index("thought_end", self.thought_end)
            if self.thought_start is None or self.thought_start > self.thought_end:
                raise ValueError(
                    f"the thought of trace {quoted(self.trace_id)} runs from {self.thought_start} to {self.thought_end}: "
                    "give a start that is not after the end"
                )

    @property
    def thought(self) -> range | None:
        """The tokens of the thought, up to the end of the trace where it was never closed; None without a thought."""
        if self.thought_start is None:
            return None
        return range(self.thought_start, len(self.token_ids) if self.thought_end is None else self.thought_end)

    def _check_index(self, name: str, value: object) -> None:
        if type(value) is not int or not 0 <= value <= len(self.token_ids):
            raise ValueError(
                f"{name} of trace {quoted(self.trace_id)} is {quoted(value)}: give a whole number from 0 to its length {len(self.token_ids)}"
            )


_FIELDS = {item.name for item in dataclasses.fields(Trace)}


def trace_from_ids(
    trace_id: str, prompt_ids: Sequence[int], generated_ids: Sequence[int], tags: TokenTags | None
) -> Trace:
    """Join prompt and response and find the thought.

    The opening tag is the last one in the prompt if it was not closed there (R1's template ends in it), else the first one
    in the response. If a response closes a thought that it never opened, the thought starts at its first token. ``tags``: None
    for a model that does not think.
    """
    ids = tuple(int(token) for token in (*prompt_ids, *generated_ids))
    prompt_length = len(prompt_ids)
    if tags is None:
        return Trace(trace_id, ids, prompt_length)
    start = _after_opening_tag(ids, prompt_length, tags)
    closing = [entry for entry in tags.forms if entry[1] != THOUGHT and (start is not None or entry[2])]
    end = next((p for p in range(prompt_length if start is None else start, len(ids)) if tag_at(ids, p, closing)), None)
    if start is None and end is not None:
        start = prompt_length
    return Trace(trace_id, ids, prompt_length, start, end)


def _after_opening_tag(ids: tuple[int, ...], prompt_length: int, tags: TokenTags) -> int | None:
    for position in range(prompt_length - 1, -1, -1):
        if (found := tag_at(ids, position, tags.forms)) is not None:
            form, phase, _ = found
            if phase == THOUGHT and position + len(form) <= prompt_length:
                return position + len(form)
            if phase != THOUGHT:
                break
    opening = [entry for entry in tags.forms if entry[1] == THOUGHT]
    starts = ((p, tag_at(ids, p, opening)) for p in range(prompt_length, len(ids)))
    return next((position + len(found[0]) for position, found in starts if found), None)


def write_traces(path: str | os.PathLike[str], traces: Iterable[Trace]) -> None:
    """Write traces as JSON lines; the file appears complete or not at all.

    ValueError, and no file, for no traces at all or for a trace_id that occurs twice.
    """
    traces = list(traces)
    check_traces(traces)
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for trace in traces:
            file.write(json.dumps(dataclasses.asdict(trace), separators=(",", ":")) + "\n")


def read_traces(path: str | os.PathLike[str], *, strict: bool = False) -> list[Trace]:
    """Read JSON lines. An incomplete last line is skipped with a warning, or refused when ``strict``.

    ValueError, with the line's number, for any other broken line, for a trace_id that occurs twice, and for a file without
    traces.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"the traces {os.fspath(path)!r} cannot be read: {error.strerror or error}") from error
    lines = content.splitlines()
    may_be_cut_off = not strict and not content.endswith(b"\n")
    traces: list[Trace] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{os.fspath(path)}, line {number}"
        try:
            record = parse_json(line, where, "remove the line, or write the file again")
        except NotJSON:
            if may_be_cut_off and traces and number == len(lines):
                warnings.warn(f"{where} is cut off and was left out: {len(traces)} traces were read", stacklevel=2)
                break
            raise
        trace = _trace(where, record)
        if trace.trace_id in seen:
            raise ValueError(
                f"{where} repeats the trace_id {quoted(trace.trace_id)} of line {seen[trace.trace_id]}: keep one"
            )
        seen[trace.trace_id] = number
        traces.append(trace)
    if not traces:
        raise ValueError(f"{os.fspath(path)!r} holds no traces: generate some first")
    return traces


def check_traces(traces: Sequence[Trace]) -> None:
    """ValueError when there are no traces, or when a trace_id occurs twice."""
    if not traces:
        raise ValueError("there are no traces: generate some first")
    seen: set[str] = set()
    for trace in traces:
        if trace.trace_id in seen:
            raise ValueError(f"trace_id {quoted(trace.trace_id)} occurs twice: its routing would be counted twice")
        seen.add(trace.trace_id)


def _whole_numbers(values: Any, trace_id: str) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"token_ids of trace {quoted(trace_id)} is {quoted(values)}: give a list of token ids")
    ids = []
    for value in values:
        try:
            ids.append(-1 if isinstance(value, bool) else operator.index(value))
        except TypeError:
            ids.append(-1)
        if ids[-1] < 0:
            raise ValueError(f"token_ids of trace {quoted(trace_id)} hold {quoted(value)}: give whole numbers >= 0")
    return tuple(ids)


def _trace(where: str, record: Any) -> Trace:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}: give a JSON object with {', '.join(sorted(_FIELDS))}")
    unknown, missing = sorted(set(record) - _FIELDS), sorted({"trace_id", "token_ids", "prompt_length"} - set(record))
    if unknown or missing:
        problem = f"has the unknown key {quoted(unknown[0])}" if unknown else f"lacks {missing[0]!r}"
        if {"problem_id", "sample_idx"} <= set(record):
            raise ValueError(
                f"{where} is an answer of a run: name the file generations.jsonl, or give the run's folder"
            )
        raise ValueError(
            f"{where} {problem}: a trace holds {', '.join(sorted(_FIELDS))}; texts become traces by moe_steer.tokens.trace_from_ids "
            "and write_traces"
        )
    try:
        return Trace(**record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def right_padded(rows: Sequence[Sequence[int]], device: torch.device, width: int | None = None) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S] of token ids, each row padded on its right to ``width`` tokens; default that of the longest."""
    import torch

    size = (len(rows), max(map(len, rows)) if width is None else width)
    input_ids, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
