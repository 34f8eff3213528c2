"""Tables of numbers as nested lists of a JSON file: undefined numbers are null."""

from __future__ import annotations

from types import NoneType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def listed(array: Array) -> list[Any]:
    """A table for JSON: undefined numbers as None."""
    if array.dtype.kind != "f":
        return list(array.tolist())
    plain = array.astype(object)
    plain[~np.isfinite(array)] = None
    return list(plain.tolist())


def read_table(values: Any, dtype: Any) -> Array:
    """Nested lists as an array; ValueError for texts and other values that numpy would take for numbers."""
    known: dict[Any, set[type]] = {np.float64: {float, int, NoneType}, np.int64: {int}, np.bool_: {bool}}
    found = np.array(values, dtype=object)
    if odd := set(map(type, found.ravel().tolist())) - known[dtype]:
        raise ValueError(f"a table holds a value of the type {min(kind.__name__ for kind in odd)}")
    return found.astype(dtype)
