"""JSON and CSV that somebody may have written by hand: read strictly, and refused in one line with file, line and key.

The standard library's reader keeps the last of two equal keys, accepts NaN and Infinity, and ends deep nesting with a RecursionError.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_DEPTH = 100
"""Deepest nesting that is read: far below where the standard library runs out of stack."""
MAX_QUOTED = 200
"""Longest value that a message quotes."""
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}
# Texts of NaN, of numbers beyond float64 and of half surrogate pairs look like this. Only then every value is looked at, because
# that takes longer than the parsing itself: a line of generations.jsonl may hold 30,000 token ids.
_SUSPECT = re.compile(r"NaN|Infinity|[eE]\+?\d{3}|\d{309}|\\u[dD][89a-fA-F]")


class NotJSON(ValueError):
    """The text ends too early, or is not JSON at all: what a killed writer may leave behind."""


def parse_json(
    content: str | bytes, where: str, remedy: str, *, surrogates: bool = False, endless: bool = False
) -> Any:
    """The value that a JSON text states.

    ``where`` begins each message (a file, or a file and a line), ``remedy`` ends it. ``surrogates``: accept half surrogate pairs,
    which answers of models may contain. ``endless``: accept NaN and infinities, which transformers writes into config.json. ``NotJSON`` for what cannot be parsed; ValueError for a key that occurs twice in one object,
    for NaN, infinities and numbers beyond float64, for nesting deeper than ``MAX_DEPTH`` and for a byte order mark.
    """
    text = content if isinstance(content, str) else decode(content, where)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise NotJSON(f"{where} is not JSON ({error}): {remedy}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels: {remedy}") from None
    except _Twice as error:
        raise ValueError(f"{where} holds the key {quoted(error.args[0])} twice in one object: keep one") from None
    except ValueError:  # the interpreter's own limit on the digits of a whole number
        raise ValueError(f"{where} holds a number of more than 4300 digits: {remedy}") from None
    if _SUSPECT.search(text) or text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_odd_values(value, where, remedy, surrogates, endless)
    return value


def read_json(
    path: str | os.PathLike[str],
    remedy: str,
    expect: Mapping[str, Any] | None = None,
    missing: str = "",
    *,
    endless: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file.

    ``remedy``: what to do with a damaged file. ``expect``: see ``check_types``. ``missing``: the whole message where there is no
    such file. ``endless``: as for ``parse_json``. ValueError in one line for everything that ``parse_json`` refuses, and for a file that cannot be opened.
    """
    name = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise ValueError(missing) from None
        raise ValueError(f"{name} cannot be read ({error.strerror or error}): {remedy}") from error
    value = parse_json(content, name, remedy, endless=endless)
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {quoted(value)}: a JSON object is expected")
    return check_types(value, name, expect or {})


def read_json_lines(path: str | os.PathLike[str], torn_tail: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of each line that is not blank, of a plain or gzipped file.

    ``torn_tail`` accepts a last line that a killed writer left unfinished, and leaves it out. ValueError in one line as for
    ``parse_json``, and for a line that holds another value.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{os.fspath(path)}:{number}"
        try:
            row = parse_json(line, where, "restore the line, or cut it off if the writer was killed")
        except NotJSON:
            if torn_tail and not line.endswith(b"\n"):
                return
            raise
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(``name:line``, row) of each record of a CSV text whose first line names the columns.

    ValueError in one line for a column that is named twice or not at all, and for a record with more or fewer cells: most often
    the text of a cell holds a comma and is not in quotes.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:  # an open quote, or a cell of more than 131,072 characters
            raise ValueError(
                f"{name}:{reader.line_num} is not CSV ({error}): correct it, or give JSON lines"
            ) from error
        if cells is None:
            return
        where = f"{name}:{reader.line_num}"
        if not cells:  # a blank line
            continue
        if not columns:
            columns = cells
            for cell in cells:
                if cells.count(cell) > 1 or not cell.strip():
                    problem = f"names {quoted(cell)} twice" if cell.strip() else "leaves a column without a name"
                    raise ValueError(f"{where} {problem}: give every column a name of its own")
        elif len(cells) != len(columns):
            raise ValueError(
                f"{where}: the record has {len(cells)} cells, and {len(columns)} columns are named: put texts with commas in quotes"
            )
        else:
            yield where, dict(zip(columns, cells, strict=True))


def check_types(values: dict[str, Any], where: str, expect: Mapping[str, Any]) -> dict[str, Any]:
    """The values themselves; ValueError, which begins with ``where``, names the first key with a value of another type.

    ``expect``: key -> str, int, float (any finite number), bool, list, dict, ``list[...]``, ``tuple[..., ...]`` (a list), a
    Literal, or a union of these. A key that is absent is no error.
    """
    for key, kind in expect.items():
        if key in values and not _fits(values[key], kind):
            at = f"{where}: " if where else ""
            raise ValueError(f"{at}{quoted(key)} is {quoted(values[key])}: give {_words(kind)}")
    return values


def record_of(kind: Any, data: Mapping[str, Any], where: str, **built: Any) -> Any:
    """A dataclass from its JSON object. ``built``: the fields that are more than plain JSON values, made by the caller. ValueError for a
    value of another type, and for a key that is missing or unknown."""
    plain = {key: value for key, value in data.items() if key not in built}
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.default_factory is MISSING}
    if odd := sorted(set(plain) - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{where}: unknown key {quoted(odd[0])}")
    if lacking := [name for name, default in fields.items() if default is MISSING and name not in {*plain, *built}]:
        raise ValueError(f"{where}: {lacking[0]!r} is missing")
    hints = get_type_hints(kind)
    return kind(**check_types(plain, where, {key: hints[key] for key in plain}), **built)


def is_number(value: object) -> bool:
    """Whether it is an int or float (no bool) that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def quoted(value: object) -> str:
    """``repr``, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."


def short(said: object, limit: int = MAX_QUOTED) -> str:
    """What a library or server said, on one line and shortened to the limit: it may quote a whole file. The type of an error
    without words."""
    line = " ".join(str(said)[: 100 * limit].split()) or (type(said).__name__ if isinstance(said, Exception) else "")
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def decode(content: bytes, where: str) -> str:
    """UTF-8 without a byte order mark; ValueError for other encodings."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{where} begins with a byte order mark: save it in UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJSON(not_utf8(where, error)) from error


def not_utf8(where: str | os.PathLike[str], error: UnicodeDecodeError) -> str:
    """What to say of a text in another encoding."""
    return f"{os.fspath(where)} is not UTF-8 text ({error.reason} at byte {error.start}): save it in UTF-8"


def read_plain_or_gzipped(path: str | os.PathLike[str]) -> bytes:
    """The whole content of a file, unpacked where its name ends in .gz."""
    return b"".join(_lines(path))


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{os.fspath(path)} is a damaged gzip file ({error}): make or download it again") from error


class _Twice(ValueError):
    """A key that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _refuse_odd_values(value: Any, where: str, remedy: str, surrogates: bool, endless: bool) -> None:
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]  # not recursive, since depth is what it looks for
    while waiting:
        key, item, depth = waiting.pop()
        at = f" under the key {quoted(key)}" if key else ""
        if isinstance(item, str) and not surrogates and not _encodes(item):
            raise ValueError(f"{where} holds half a surrogate pair{at}, which is not a character: {remedy}")
        if isinstance(item, float) and not endless and not math.isfinite(item):
            raise ValueError(f"{where} holds {item}{at}, or a number too large for float64: give a finite number")
        if isinstance(item, dict | list):
            if depth == MAX_DEPTH:
                raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels{at}: {remedy}")
            if isinstance(item, dict):
                waiting += [(name, inner, depth + 1) for name, inner in item.items()]
                waiting += [(name, name, depth + 1) for name in item if not _encodes(name)]
            else:
                odd = (inner for inner in item if type(inner) is not int)
                waiting += [(key, inner, depth + 1) for inner in odd]


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind) and type(value) in map(type, get_args(kind))
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        return isinstance(value, list) and (
            set(map(type, value)) <= {inner} if inner in (int, str) else all(_fits(one, inner) for one in value)
        )
    if kind is float:
        return is_number(value)
    return type(value) is kind


def _words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) in (list, tuple):
        return f"a list, each item {_words(get_args(kind)[0])}"
    return _WORDS[kind]
