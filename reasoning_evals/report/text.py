"""Numbers and model output as text for reports."""

from __future__ import annotations

from moe_steer.errors import visible as visible
from reasoning_evals.comparing import (
    NO_INTERVAL,
    Difference,
    DomainAccuracy,
    Length,
    Measure,
    length_interval,
    percent_change,
    points,
)

OUTCOMES = {
    "correct": "correct",
    "wrong": "wrong",
    "no_answer": "no answer",
    "cut": "answer cut",
    "unclosed": "thought never closed",
    "truncated": "thought cut",
    "grader_error": "grader error",
}


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.1234), percent(None)
    ('12.3%', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def percent_interval(measure: Measure | DomainAccuracy) -> str:
    """The interval of an accuracy."""
    return "–" if measure.low is None or measure.high is None else f"{100 * measure.low:.1f} – {100 * measure.high:.1f}"


def count(value: float | None) -> str:
    """A mean number of tokens.

    >>> count(1234.5), count(87.25), count(3.21), count(None)
    ('1,234', '87.2', '3.2', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"


def count_interval(measure: Measure | None) -> str:
    """The interval of a number of tokens."""
    return "" if measure is None else f"{count(measure.low)} – {count(measure.high)}"


def signed_count(value: float) -> str:
    """A difference of tokens, with a real minus sign.

    >>> signed_count(12.34), signed_count(-1500.2), signed_count(-0.04)
    ('+12.3', '−1,500', '0.0')
    """
    size = count(abs(value))
    return size if size == "0.0" else f"{'+' if value > 0 else '−'}{size}"


def signed_points(value: float) -> str:
    """A difference of shares in percentage points, with a real minus sign."""
    return minus(points(value))


def signed_percent(ratio: float) -> str:
    """A ratio as a change in percent, with a real minus sign.

    >>> signed_percent(0.734), signed_percent(1.05)
    ('−26.6%', '+5.0%')
    """
    return minus(percent_change(ratio))


def length_change(length: Length | None) -> str:
    """The ratio of mean tokens as a change in percent, with its interval and its verdict."""
    if length is None:
        return "–"
    what = "" if length.of_thoughts else " (all tokens)"
    return f"{signed_percent(length.ratio)}{what}, {minus(length_interval(length))}: {length.verdict}"


def minus(number: str) -> str:
    """A number in a table or chart: its hyphen becomes a real minus sign."""
    return number.replace("-", "−")


def points_interval(difference: Difference) -> str:
    """The interval of a difference of accuracies; a note where all problems changed alike, so that there is none."""
    if difference.se == 0:
        return NO_INTERVAL
    return f"{signed_points(difference.low)} to {signed_points(difference.high)}"


def bootstrap_points_interval(difference: Difference) -> str:
    """As ``points_interval``, from the bootstrap."""
    if difference.se == 0:
        return NO_INTERVAL
    return f"{signed_points(difference.bootstrap_low)} to {signed_points(difference.bootstrap_high)}"


def signed_interval(difference: Difference) -> str:
    """The interval of a difference of tokens; a note where all problems changed alike, so that there is none."""
    if difference.se == 0:
        return NO_INTERVAL
    return f"{signed_count(difference.low)} to {signed_count(difference.high)}"
