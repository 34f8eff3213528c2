"""Completions on disk: append-only JSON lines that survive a killed process at any moment; and how those of an arm are read, where
the thought ends and the answer begins."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_type_hints

from moe_steer.files import naming_full_disk
from moe_steer.json_files import check_types, parse_json, quoted
from moe_steer.thinking import FORMATS, ThinkingFormat, Thought, TokenTags, opening_shown, read_from_text
from reasoning_evals.thinking import TokenCounts, count_tokens

FINISH_REASONS = ("stop", "length", "content_filter")
_DIGEST = "digest"
_OPTIONAL = ("num_tokens", "num_thinking")
_LINE_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


class CompletionKey(NamedTuple):
    """The identity of a sample: unique in a run folder."""

    arm: str
    task: str
    problem_id: str
    sample_idx: int
    config_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer as generated, before any grading."""

    arm: str
    task: str
    problem_id: str
    sample_idx: int
    """0..k-1; the same number has the same seed in every arm."""
    prompt: str
    """The rendered prompt, template and forced ``<think>`` included."""
    text: str
    """The generated tokens as text, with ``</think>`` and other special tokens, without the stop token."""
    token_ids: tuple[int, ...]
    """The generated ids, including the stop token."""
    finish_reason: str
    """"stop" (a stop token came), "length" (the token limit came first) or "content_filter" (an endpoint's filter ended it)."""
    seed: int
    config_hash: str
    num_tokens: int | None = None
    """Generated tokens by an endpoint's count, where it sends no ids. Like the next one written only where it is known."""
    num_thinking: int | None = None
    """Tokens of the thought by an endpoint's count."""

    def is_of(self, tokenizer: Any) -> bool:
        """Whether its tokens are its text under a tokenizer, as far as letters and digits of the beginning say: servers write special
        tokens and white space in their own ways, and half a character is written in several."""

        def letters(text: str) -> str:
            return "".join(islice(filter(str.isalnum, text), 60))

        text, ids = letters(self.text), list(self.token_ids[:200])
        try:
            read = [letters(tokenizer.decode(ids, skip_special_tokens=skip)) for skip in (False, True)]
        except OverflowError:  # ids of no tokenizer
            return False
        if not text:
            return True
        if not any(read):  # 200 tokens of signs say nothing; fewer, beside letters, are no tokens of this tokenizer
            return len(ids) < len(self.token_ids)
        return any(one and (text.startswith(one) or one.startswith(text)) for one in read)

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason must be one of {FINISH_REASONS}, got {self.finish_reason!r}")

    @property
    def key(self) -> CompletionKey:
        """The identity of the sample."""
        return CompletionKey(self.arm, self.task, self.problem_id, self.sample_idx, self.config_hash)

    @property
    def total_tokens(self) -> int:
        """All generated tokens, including tags and stop token."""
        return len(self.token_ids) if self.num_tokens is None else self.num_tokens

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal completions."""
        return _digest_of(json_line(self._row))

    @property
    def _row(self) -> dict[str, Any]:
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # asdict copies every token
        return {name: row[name] for name in row if name not in _OPTIONAL or row[name] is not None}

    def to_json(self) -> str:
        """One line without its newline; equal completions give equal lines. It ends with its own digest, by which it is noticed
        when somebody has changed it."""
        line = json_line(self._row)  # long: written once
        return f'{line[:-1]},"{_DIGEST}":"{_digest_of(line)}"}}'

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Completion:
        """ValueError when a key is missing or unknown, a value has another type, or another digest stands there than its own."""
        names = {field.name for field in dataclasses.fields(cls)}
        if _DIGEST in row:  # lines of earlier versions have none
            row = dict(row)
            said = row.pop(_DIGEST)
            if (found := cls.from_dict(row)).digest != said:
                raise ValueError("it was changed since it was sampled, its digest is another")
            return found
        if not names.difference(_OPTIONAL) <= set(row) <= names:
            raise ValueError(f"a completion has the keys {sorted(names)}, got {quoted(sorted(row))}")
        check_types(row, "", _TYPES)
        if min(row["token_ids"], default=0) < 0:
            raise ValueError(f"token_ids hold {min(row['token_ids'])}: a token's number is 0 or more")
        return cls(**{**row, "token_ids": tuple(row["token_ids"])})


_TYPES = {**get_type_hints(Completion), "token_ids": list[int]}
_REMEDY = "restore the line, or delete it and it is sampled again"


def _digest_of(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def json_line(row: Mapping[str, Any]) -> str:
    """A JSON object on one line, readable where its text is valid Unicode, escaped where it has lone surrogates.

    Characters that ``str.splitlines`` takes for line ends are escaped, because many readers of such files split by it.
    """
    line = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    for character, escaped in _LINE_ENDS:
        line = line.replace(character, escaped)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row, separators=(",", ":"))
    return line


def sample_name(one: Any) -> str:
    """What a sample of a run, by its completion or its grade, is called among traces."""
    return f"{one.arm}/{one.task}/{one.problem_id}#{one.sample_idx}"


def read_completions(path: Path) -> Iterator[Completion]:
    """The completions of one file, in order.

    A last line without a newline was left by a killed process and is ignored; any other line that is not a
    completion is a ValueError that names file and line.
    """
    for number, line in enumerate(complete_lines(path), 1):
        where = f"{path}:{number}: not a completion"
        row = parse_json(line, f"{where}: the line", _REMEDY, surrogates=True)
        try:
            completion = Completion.from_dict(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} ({error}): {_REMEDY}") from error
        yield completion


def complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that end in a newline."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


class JsonLinesWriter:
    """Appends lines to a file. Each line is handed to the operating system before ``append`` returns, so a killed process
    loses none. They are forced onto the disk at most once a second and on closing (that takes milliseconds, longer than a
    short sample): only a power failure can lose the last second, and those samples are made again.

    A torn last line of a killed process is cut off first, so that the next line does not continue it. ValueError
    when another process is writing to the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"another process is writing to {path}: wait for it, or take another folder") from error
        self._synced = time.monotonic()
        os.ftruncate(self._file, _end_of_last_line(self._file))

    def append(self, line: str) -> None:
        """Write one line; ``line`` contains no newline."""
        assert "\n" not in line
        data = memoryview(line.encode() + b"\n")
        with naming_full_disk(self._path):
            while data:
                data = data[os.write(self._file, data) :]
            if time.monotonic() - self._synced > 1.0:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Force the lines onto the disk and release the file."""
        try:
            with naming_full_disk(self._path):
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_of_last_line(file: int, block: int = 1 << 16) -> int:
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class ArmThoughts(NamedTuple):
    """The thinking format of an arm's model."""

    fmt: ThinkingFormat | None
    """None where the sampler did not say: then each text is read by the tags that it shows."""
    tags: TokenTags | None
    """Its tags as token ids; None where there are none, or the sampler did not say."""
    opened: bool | None
    """Whether every prompt of the arm opens a thought; None: the end of each prompt decides."""

    def split(self, text: str | None, prompt: str) -> Thought:
        """Thought and answer of one completion.

        A model that is said not to think, and writes a known opening tag first, is read by that tag: a truncated thought must
        not be graded because nothing in the template spoke of it.
        """
        fmt = self._of(text, prompt)
        return fmt.split(text, opened=self.opens(prompt))

    def opens(self, prompt: str) -> bool:
        """Whether completions of a prompt start inside the thought."""
        if self.opened is not None:
            return self.opened
        return (self.fmt or FORMATS["think"]).opens(prompt)

    def count_tokens(self, token_ids: Sequence[int], prompt: str, text: str, stopped: bool) -> TokenCounts | None:
        """Tokens of thought and answer; None where the tags' ids are not known."""
        if self.tags is not None:
            return count_tokens(token_ids, self.opens(prompt), self.tags, stopped)
        if self.fmt is not None and not self.fmt.thinks and self._of(text, prompt) is self.fmt:
            return TokenCounts(0, len(token_ids) - stopped, len(token_ids))
        return None

    def _of(self, text: str | None, prompt: str) -> ThinkingFormat:
        if self.fmt is None:
            return read_from_text(text, self.opens(prompt))
        return self.fmt if self.fmt.thinks else opening_shown(text) or self.fmt


def run_thoughts(config: Mapping[str, Any]) -> dict[str, ArmThoughts]:
    """Of every arm in a run's config."""
    return {name: arm_thoughts(arm) for name, arm in config["arms"].items()}


def arm_thoughts(arm: Mapping[str, Any]) -> ArmThoughts:
    """Of an arm's entry in run.json."""
    sampler = arm.get("sampler", {})
    said = arm.get("details", {}).get("prompt_opens_thought")
    fmt = ThinkingFormat.from_dict(sampler["thinking"]) if sampler.get("thinking") else None
    tags = sampler.get("thinking_tokens")
    return ArmThoughts(fmt, TokenTags.from_dict(tags) if tags else None, None if said is None else bool(said))
