"""Broken files for the fuzzer: bytes, JSON values, lines, cells and headers, each changed in one or two places by a seeded die."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutate = Callable[[random.Random, bytes], bytes]

_RAW, _TWICE = "@@RAW@@", "@@TWICE@@"
_TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "1e400", "-1e400", "9" * 400, "9" * 5000, "[" * 3000 + "]" * 3000)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e300, 2**31, 2**63, -(2**63), 10**20, 10**308, "", "x", "true", "false", "1", "nan",
    "x" * 5000, "\ud800", "\x00", "\x1b[31mred\x1b[0m", "../../../etc/passwd", "/etc/passwd", "a/b", "..", "é\u202e", [], {}, [[]], [None],
    [1, 2, 3], ["x"], {"x": 1}, {"layer": 1}, [0] * 300, {str(i): i for i in range(300)},
)  # fmt: skip


def mutate_bytes(dice: random.Random, data: bytes) -> bytes:
    """A flipped bit, a piece that is missing, repeated, moved or foreign, an early end, another encoding."""
    at = dice.randrange(max(1, len(data)))
    length = min(dice.choice((1, 1, 2, 4, 8, 40)), max(1, len(data) - at))
    ways: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :] if data else b"\x00",
        lambda: data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
        lambda: data[:at],
        lambda: data[:at] + data[at + length :],
        lambda: data[: at + length] + data[at:],
        lambda: data[:at] + dice.choice((b"\x00", b"\xff", b'"', b"{", b"[", b",", b"\n", b"\r", b"-", b"9" * 400, b"\\ud800")) + data[at:],
        lambda: data[:at] + dice.randbytes(length) + data[at + length :],
    ]  # fmt: skip
    if dice.random() < 0.1:
        return dice.choice(
            (b"", b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), data + data, b"\n", b"null")
        )
    return dice.choice(ways)()


def mutate_json(dice: random.Random, data: bytes) -> bytes:
    """One value of another kind, a key that is missing, strange or there twice, an item more or less; now and then bytes."""
    if dice.random() < 0.2:
        return mutate_bytes(dice, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(dice, data)
    holder: dict[str, Any] = {"": value}
    places = list(_places(holder, ""))
    container, key = dice.choice(places)
    old, token = container[key], None
    kind = dice.random()
    if kind < 0.55:
        container[key] = dice.choice(_VALUES)
        if isinstance(old, int | float) and not isinstance(old, bool) and dice.random() < 0.4:
            container[key] = dice.choice((-old, old + 1, old * 1000, str(old), float(old), [old], old - 1, old + 0.5))
    elif kind < 0.68:
        token = dice.choice(_TOKENS)
        container[key] = _RAW
    elif kind < 0.78 and key != "":
        del container[key]
    elif kind < 0.86 and isinstance(container, dict) and key != "":
        container[f"{_TWICE}{key}"] = dice.choice((old, dice.choice(_VALUES)))
    elif kind < 0.92 and isinstance(old, list):
        container[key] = dice.choice((old + old[:1], old[1:], old * 40, [*old, None]))
    elif isinstance(old, dict):
        old[dice.choice(("zz_unknown", "__class__", "", "x" * 3000, "\ud800", "\x1b[2J"))] = dice.choice(_VALUES)
    else:
        container[key] = [old] if dice.random() < 0.5 else {"value": old}
    text = json.dumps(holder[""], indent=dice.choice((None, None, 1)))
    return text.replace(f'"{_RAW}"', token or "null").replace(_TWICE, "").encode()


def _places(value: Any, name: Any) -> Any:
    """(container, key) of every value, seldom of many items of one list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:4])
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner, key)


def mutate_lines(dice: random.Random, data: bytes) -> bytes:
    """JSON lines: one line changed as JSON, missing, there twice, cut, or glued to the next."""
    lines = data.split(b"\n")
    full = [i for i, line in enumerate(lines) if line.strip()]
    if not full:
        return mutate_bytes(dice, data)
    at, kind = dice.choice(full), dice.random()
    if kind < 0.8:
        lines[at] = mutate_json(dice, lines[at])
    elif kind < 0.85:
        lines.insert(at, lines[at])
    elif kind < 0.9:
        del lines[at]
    elif kind < 0.95:
        lines[at] = dice.choice((b"null", b"[]", b"3", b"{}", b'"x"', lines[at][: len(lines[at]) // 2]))
    else:
        lines[at] += b" "  # glued below
        return b"\n".join(lines[: at + 1]) + b"".join(lines[at + 1 :])
    return b"\n".join(lines)


def mutate_csv(dice: random.Random, data: bytes) -> bytes:
    """Cells too many or too few, names that are strange or there twice, open quotes, huge cells."""
    if dice.random() < 0.25:
        return mutate_bytes(dice, data)
    lines = data.split(b"\n")
    at = dice.randrange(max(1, len(lines) - 1))
    cells = lines[at].split(b",")
    cell = dice.randrange(len(cells))
    ways: list[Callable[[], list[bytes]]] = [
        lambda: [*cells, b"more"],
        lambda: cells[:-1],
        lambda: [*cells[:cell], b'"' + cells[cell], *cells[cell + 1 :]],
        lambda: [*cells[:cell], b"x" * dice.choice((300, 200_000)), *cells[cell + 1 :]],
        lambda: [*cells[:cell], dice.choice((b"", b"\x00", b"nan", b"inf", b"1e999", b"\x1b[2J", b'a"b')), *cells[cell + 1 :]],
        lambda: [cells[0]] * len(cells),
        lambda: [],
        lambda: cells + cells,
    ]  # fmt: skip
    lines[at] = b",".join(dice.choice(ways)())
    return b"\n".join(lines)


def mutate_safetensors(dice: random.Random, data: bytes) -> bytes:
    """The header changed as JSON, also inside its metadata; its length; the numbers; the end."""
    if len(data) < 8:
        return mutate_bytes(dice, data)
    kind = dice.random()
    length = struct.unpack("<Q", data[:8])[0]
    head, body = data[8 : 8 + length], data[8 + length :]
    if kind < 0.1:
        return mutate_bytes(dice, data)
    if kind < 0.2:
        return struct.pack("<Q", dice.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1, len(data)))) + data[8:]
    if kind < 0.35 and body:
        return data[: 8 + length] + mutate_bytes(dice, body)
    if kind < 0.65:
        head = mutate_json(dice, head)
    else:
        try:
            values = json.loads(head)
            metadata = values["__metadata__"]
            name = dice.choice(sorted(metadata))
            metadata[name] = mutate_json(dice, metadata[name].encode()).decode("utf-8", "replace")
            head = json.dumps(values).encode()
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            head = mutate_json(dice, head)
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


def mutate_header(dice: random.Random, data: bytes) -> bytes:
    """GGUF and other binary files: mostly the first bytes; now and then a length that is huge."""
    if dice.random() < 0.3:
        at = dice.randrange(0, max(1, min(len(data), 2000) - 8))
        number = dice.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        return data[:at] + struct.pack("<Q", number) + data[at + 8 :]
    if dice.random() < 0.7:
        return mutate_bytes(dice, data[:2500]) + data[2500:]
    return mutate_bytes(dice, data)
