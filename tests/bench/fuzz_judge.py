"""Whether a broken file may be read at all: a second opinion that knows the formats by their examples, and shares no code with the
readers.

The example says which keys there are and of which type; ``Rules`` says what else is legal. What breaks neither is legal, and may be
read or refused.
"""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Judge = Callable[[bytes, bytes], str]
"""(example, broken file) -> why it must be refused, or ""."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is legal beyond the example. Names are those of keys, at any depth."""

    optional: frozenset[str] = frozenset()
    """May be missing; ``*``: any."""
    free: frozenset[str] = frozenset()
    """Any value may stand there."""
    names: frozenset[str] = frozenset()
    """Objects whose keys are anybody's."""
    also: dict[str, tuple[type, ...]] = field(default_factory=dict)
    """Further types."""
    unknown: bool = False
    """Keys that the example lacks are ignored."""
    marked: bool = False
    """A byte order mark is skipped."""
    halves: bool = False
    """Half surrogate pairs are kept."""
    endless: bool = False
    """NaN and infinities are kept."""
    torn: bool = False
    """A last line without an end is left out."""
    objects: bool = False
    """Reads one object, whatever its example is."""
    lowest: dict[str, float] = field(default_factory=dict)


def json_judge(rules: Rules) -> Judge:
    """One JSON text."""

    def judge(example: bytes, broken: bytes) -> str:
        return _problem(json.loads(example), broken, rules)

    return judge


def lines_judge(rules: Rules) -> Judge:
    """JSON lines, each like the first of the example."""

    def judge(example: bytes, broken: bytes) -> str:
        patterns = [json.loads(line) for line in example.split(b"\n") if line.strip()]
        lines = broken.split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip() or (rules.torn and number == len(lines) - 1):
                continue
            problem = _problem(patterns[min(number, len(patterns) - 1)], line, rules)
            if problem:
                return f"line {number + 1}: {problem}"
        return ""

    return judge


def csv_judge(*columns: str) -> Judge:
    """Every row has as many cells as there are names."""

    def judge(example: bytes, broken: bytes) -> str:
        try:
            rows = list(csv.reader(io.StringIO(broken.removeprefix(b"\xef\xbb\xbf").decode("utf-8"), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            return str(error)
        rows = [row for row in rows if row]
        if not rows or set(columns) - set(rows[0]):
            return "a column is missing"
        if len(set(rows[0])) < len(rows[0]):
            return "a column is named twice"
        return next((f"{len(row)} cells" for row in rows if len(row) != len(rows[0])), "")

    return judge


def safetensors_judge(key: str = "", rules: Rules | None = None, finite: bool = True) -> Judge:
    """Header, sizes and order by the letter of the format; the JSON text under a metadata key by its rules."""
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}

    def judge(example: bytes, broken: bytes) -> str:
        try:
            (length,) = struct.unpack("<Q", broken[:8])
            header = json.loads(broken[8 : 8 + length].decode(), object_pairs_hook=_pairs)
            metadata = header.pop("__metadata__", {})
            end = 0
            for entry in sorted(header.values(), key=lambda item: item["data_offsets"]):
                size = math.prod(entry["shape"]) * widths.get(entry["dtype"], 0)
                begin, stop = entry["data_offsets"]
                if begin != end or (entry["dtype"] in widths and stop != end + size):  # a type of tomorrow is any size
                    return "offsets and shape contradict each other"
                end = stop
            if end != len(broken) - 8 - length:
                return "the file is not as long as its header says"
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, OverflowError) as error:
            return f"no header ({error})"
        if key:
            wanted = json.loads(example[8 : 8 + struct.unpack("<Q", example[:8])[0]])["__metadata__"][key]
            return _problem(json.loads(wanted), str(metadata.get(key, "")).encode("utf-8", "replace"), rules or Rules())
        return ""

    return judge


def held(example: bytes, broken: bytes) -> str:
    """A file whose content is held by a digest: as values where it is JSON, else every byte."""
    try:
        if json.dumps(json.loads(broken, object_pairs_hook=_pairs)) == json.dumps(json.loads(example)):
            return ""
    except (ValueError, RecursionError):
        pass
    return "" if broken == example else "it is not what was written"


def anything(example: bytes, broken: bytes) -> str:
    """Nothing is known to be illegal."""
    return ""


class _Odd(ValueError):
    """Legal for the library's parser, and not for ours."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise _Odd("a key stands twice")
    return dict(pairs)


def _problem(example: Any, broken: bytes, rules: Rules) -> str:
    def number(text: str) -> float:
        if not rules.endless and not math.isfinite(float(text)):
            raise _Odd(f"{text[:20]} is not finite")
        return float(text)

    try:
        text = (broken.removeprefix(b"\xef\xbb\xbf") if rules.marked else broken).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=number, parse_float=number)
        if not rules.halves:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return str(error)[:80] or "no JSON"
    if _depth(value) > 100:
        return "nested too deeply"
    return _unlike(example, value, "", rules)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        inner = [
            list(item.values()) if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        level, depth = [item for items in inner for item in items], depth + 1
    return depth


def _unlike(example: Any, value: Any, name: str, rules: Rules) -> str:
    if name in rules.free:
        return ""
    kinds = (int, float) if type(example) is float else (type(example),)
    if type(value) not in (*kinds, *rules.also.get(name, ())):
        return f"{name!r} is a {type(value).__name__}"
    if isinstance(value, int | float) and abs(value) > 1.8e308 and not rules.endless:
        return f"{name!r} is beyond float64"
    if name in rules.lowest and isinstance(value, int | float) and value < rules.lowest[name]:
        return f"{name!r} is too low"
    if isinstance(value, list) and isinstance(example, list) and example:
        return next((problem for item in value if (problem := _like_any(example, item, name, rules))), "")
    if not isinstance(value, dict) or not isinstance(example, dict):
        return ""
    if name in rules.names:
        return next(
            (problem for item in value.values() if (problem := _like_any(list(example.values()), item, "", rules))), ""
        )
    missing = set(example) - set(value) - rules.optional
    if missing and "*" not in rules.optional:
        return f"{min(missing)!r} is missing"
    if set(value) - set(example) and not rules.unknown:
        return f"{min(set(value) - set(example))[:20]!r} is unknown"
    return next((p for key in value if key in example and (p := _unlike(example[key], value[key], key, rules))), "")


def _like_any(examples: list[Any], item: Any, name: str, rules: Rules) -> str:
    problems = [_unlike(example, item, name, rules) for example in examples[:8]]
    return "" if "" in problems or not problems else problems[0]
