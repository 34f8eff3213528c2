"""Rollouts on disk that hold routing: replies of vLLM and SGLang, and the records of training frameworks.

Read are JSON (one reply, or a list), JSON lines (also gzipped) and parquet, a row a reply. What a row may look like:

==============================  =============================  ==========================================================
of                              tokens                         ``routed_experts``
==============================  =============================  ==========================================================
vLLM completions, chat          choices[].prompt_token_ids     choices[].routed_experts: base64 of a .npy file; rows from
                                (or once, beside choices),     ``routed_experts_prompt_start`` on
                                choices[].token_ids
SGLang /generate                meta_info.input_token_logprobs meta_info.routed_experts: base64 of int32, no header
                                or prompt_ids, output_ids
SGLang chat                     prompt_token_ids, token_ids    choices[].sglext.routed_experts (or once), likewise
slime samples                   tokens, response_length        rollout_routed_experts: nested lists
flat records (RL frameworks)    one of `PROMPT`, of `RESPONSE` routed_experts, expert_ids or topk_ids: nested lists, base64,
                                                               bytes, or {"data", "shape", "dtype"}; weights beside them
                                                               as routed_weights, expert_weights or topk_weights
==============================  =============================  ==========================================================
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_steer.json_files import parse_json, quoted, read_json_lines, read_plain_or_gzipped

Array = np.ndarray[Any, Any]

PROMPT = ("prompt_token_ids", "prompt_ids", "prompts_ids", "input_ids", "prompt_tokens_ids")
RESPONSE = ("token_ids", "completion_ids", "response_ids", "output_ids", "completion_token_ids", "response_token_ids")
ROUTED = ("routed_experts", "rollout_routed_experts", "expert_ids", "topk_ids")
WEIGHTS = ("routed_weights", "expert_weights", "topk_weights")
PROBLEM = ("trace_id", "problem_id", "uid", "group_id")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")


class Rollout(NamedTuple):
    """One sampled response with its recorded routing, not yet held against a model."""

    problem: str
    """The problem that it answers: the row's own name for it, else a digest of the prompt."""
    prompt_ids: list[int]
    response_ids: list[int]
    topk_ids: Array
    topk_weights: Array | None
    first: int
    """Token of the first row of ``topk_ids``."""
    where: str
    """File and row."""


def read_rollouts(path: str | os.PathLike[str]) -> Iterator[Rollout]:
    """The rollouts of a file, or of all files in a folder; ValueError in one line, with file and row, for a row without tokens
    or without routing, and where there are none."""
    files = _files(Path(path))
    found = False
    for file in files:
        for where, row in _rows(file):
            for choice in _choices(row, where):
                found = True
                yield _rollout(choice, where)
    if not found:
        raise ValueError(f"{os.fspath(path)} holds no rollouts: give replies or records that hold {ROUTED[0]}")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
    else:
        files = [path] if path.is_file() and path.name.endswith(SUFFIXES) else []
    if not files:
        raise ValueError(f"no rollouts at {os.fspath(path)!r}: give {', '.join(SUFFIXES)} files, or a folder of them")
    return files


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".json":
        value = parse_json(read_plain_or_gzipped(file), str(file), "record the rollouts again")
        for number, row in enumerate(value if isinstance(value, list) else [value], 1):
            if not isinstance(row, dict):
                raise ValueError(f"{file}, row {number} is {quoted(row)}: a JSON object is expected")
            yield f"{file}, row {number}", row
    else:
        yield from read_json_lines(file, torn_tail=True)


def _parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", {key: value for key, value in row.items() if value is not None}
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} is no parquet file ({quoted(str(error))}): write the rollouts again") from error


def _choices(row: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    """The replies in a row, each with what stands once beside them."""
    choices = row.get("choices", [{}])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"{where}: choices is {quoted(choices)}: a list of objects is expected")
    beside = {key: value for key, value in row.items() if key != "choices"}
    for choice in choices:
        merged = {**beside, **choice}
        for name in ("meta_info", "sglext"):
            if isinstance(merged.get(name), dict):
                merged |= {key: value for key, value in merged[name].items() if key not in (*PROMPT, *RESPONSE)}
        yield merged


def _rollout(row: Mapping[str, Any], where: str) -> Rollout:
    routed_key, routed = _one_of(row, ROUTED)
    if routed is None:
        raise ValueError(
            f"{where} holds no {ROUTED[0]} (its keys: {quoted(sorted(map(str, row)))}): start the engine with "
            "--enable-return-routed-experts, and keep what it returns"
        )
    prompt_ids, response_ids = _tokens(row, where)
    weights_key, weights = _one_of(row, WEIGHTS)
    first = row.get("routed_experts_prompt_start", 0)
    if type(first) is not int or first < 0:
        raise ValueError(f"{where}: routed_experts_prompt_start is {quoted(first)}: give a whole number >= 0")
    _, name = _one_of(row, PROBLEM)
    digest = hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest()[:16]
    return Rollout(
        problem=str(name) if name not in (None, "") else f"prompt-{digest}",
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        topk_ids=decode_array(routed, f"{where}: {routed_key}", np.dtype("<i4")),
        topk_weights=None if weights is None else decode_array(weights, f"{where}: {weights_key}", np.dtype("<f4")),
        first=first,
        where=where,
    )


def _tokens(row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    if "tokens" in row and "response_length" in row:
        tokens, length = _ids(row["tokens"], f"{where}: tokens"), row["response_length"]
        if type(length) is not int or not 0 <= length <= len(tokens):
            raise ValueError(f"{where}: response_length is {quoted(length)}: give a whole number up to {len(tokens)}")
        return tokens[: len(tokens) - length], tokens[len(tokens) - length :]
    prompt_key, prompt = _one_of(row, PROMPT)
    if prompt is None and "input_token_logprobs" in row:
        prompt_key, prompt = "input_token_logprobs", _second(row["input_token_logprobs"])
    response_key, response = _one_of(row, RESPONSE)
    if response is None and "output_token_logprobs" in row:
        response_key, response = "output_token_logprobs", _second(row["output_token_logprobs"])
    if prompt is None or response is None:
        missing, known = ("prompt", PROMPT) if prompt is None else ("response", RESPONSE)
        raise ValueError(
            f"{where} holds no token ids of the {missing} (one of {', '.join(known)}): ask the engine for them "
            "(vLLM: return_token_ids; SGLang: return_logprob with logprob_start_len 0)"
        )
    return _ids(prompt, f"{where}: {prompt_key}"), _ids(response, f"{where}: {response_key}")


def _second(entries: Any) -> Any:
    """SGLang's log-probabilities are [value, token id, text] each."""
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) > 1 for entry in entries):
        return entries
    return [entry[1] for entry in entries]


def _one_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    return next(((name, row[name]) for name in names if row.get(name) is not None), (names[0], None))


def _ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{where} is {quoted(value)}: a list of token ids is expected")
    return value


def decode_array(value: Any, where: str, raw: np.dtype[Any]) -> Array:
    """The array in any of the forms of the table above; ``raw``: the type of bytes that come without a header."""
    try:
        if isinstance(value, dict):
            content = _bytes(value["data"])
            array = np.frombuffer(content, dtype=np.dtype(str(value["dtype"]))).reshape(
                [int(n) for n in value["shape"]]
            )
        elif isinstance(value, str | bytes):
            content = _bytes(value)
            if content.startswith(b"\x93NUMPY"):
                array = np.load(io.BytesIO(content), allow_pickle=False)
            else:
                array = np.frombuffer(content, dtype=raw)
        else:
            array = np.array(value)
    except (ValueError, TypeError, KeyError, binascii.Error, OverflowError) as error:
        raise ValueError(f"{where} cannot be read as an array ({quoted(str(error))}): record it again") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{where} holds {array.dtype} values: numbers of one shape are expected")
    return array


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
