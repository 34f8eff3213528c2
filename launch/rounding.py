"""Numbers as results.json holds them: far below any standard error, above the rounding of sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIGITS = 6


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, inside any nesting; what is no number becomes None, minus zero becomes 0."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0 if value == value else None
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value
