"""Shorter thoughts and their price: length as a ratio to the baseline, accuracy against a margin, repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

from reasoning_evals.comparing.comparison import ArmSummary, Difference
from reasoning_evals.comparing.verdicts import NO_INTERVAL, points
from reasoning_evals.runs import GradeRow
from reasoning_evals.thinking import longest_repeat, loop_at_end

SHORTER_HELD, SHORTER_OPEN, SHORTER_LOST = (
    "shorter, accuracy held",
    "shorter, accuracy not settled",
    "shorter, accuracy lost",
)
LONGER, SAME = "longer", "no change in length shown"
MARGIN = 0.03
"""Loss of accuracy that still counts as "held": the lower end of the 95% interval must stay above its negative."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean over problems divided by another, paired, with a 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Thoughts:
    """The thoughts of one arm. Shares are of all samples."""

    thinking_tokens: float
    closed: float
    truncated: float
    loops: float
    """Samples that end in a loop (the same tokens three times or more, at least 30 tokens)."""
    repetition: float
    """Longest sequence of tokens that occurs twice, as a share of the generated tokens; mean over samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """One arm against the baseline."""

    arm: str
    tokens: Ratio
    """Thinking tokens of the arm / of the baseline."""
    accuracy: Difference
    verdict: str
    sentence: str


def paired_ratio(a_P: Sequence[float], b_P: Sequence[float], confidence: float = 0.95) -> Ratio:
    """mean(b) / mean(a) over the same problems, with the t interval of the linearised ratio (delta method):
    se = sd(b - r a) / (sqrt(n) mean(a)).

    ValueError with fewer than two problems, unequal lengths, or a mean of a that is not positive.
    """
    if len(a_P) != len(b_P) or len(a_P) < 2:
        raise ValueError(f"a ratio needs the same two or more problems in both arms, got {len(a_P)} and {len(b_P)}")
    mean_a = fmean(a_P)
    if mean_a <= 0:
        raise ValueError(f"the first arm has {mean_a:g} tokens a problem: there is nothing to divide by")
    ratio = fmean(b_P) / mean_a
    n = len(a_P)
    variance = sum((b - ratio * a) ** 2 for a, b in zip(a_P, b_P, strict=True)) / (n - 1)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance / n) / mean_a
    return Ratio(ratio, ratio - half, ratio + half)


def efficiency(
    arm: str, rows: Sequence[GradeRow], accuracy: Difference, baseline: str = "baseline", margin: float = MARGIN
) -> Efficiency:
    """Judge an arm of graded samples by length and by accuracy.

    "Held" means that the 95% interval of the paired accuracy difference stays above -``margin``; "lost" that it stays below
    0; "not settled" is neither. If no problem changed at all, the interval has no width; the 95% bound on the share of
    problems that may change, 1 - 0.05^(1/n), is used instead (100 problems or more can hold 3 points). The interval of the
    length must exclude 1 for shorter or longer.
    """
    a_P, b_P = (_tokens_by_problem(rows, name) for name in (baseline, arm))
    ratio = paired_ratio(a_P, b_P)
    if ratio.low > 1:
        verdict = LONGER
    elif ratio.high >= 1:
        verdict = SAME
    elif accuracy.high < 0:
        verdict = SHORTER_LOST
    else:
        low = accuracy.low
        if accuracy.high == low:  # no problem changed, which is weak evidence when there are few problems
            low = accuracy.mean - (1 - 0.05 ** (1 / len(a_P)))
        verdict = SHORTER_HELD if low > -margin else SHORTER_OPEN
    between = f"{points(accuracy.low)} to {points(accuracy.high)}"
    if accuracy.low == accuracy.high:
        between = f"{NO_INTERVAL}: all problems moved alike"
    sentence = (
        f"{arm}: {verdict}. Thinking tokens {percent_change(ratio.value)} ({percent_change(ratio.low)} to "
        f"{percent_change(ratio.high)}), accuracy {points(accuracy.mean)} points ({between})."
    )
    return Efficiency(arm=arm, tokens=ratio, accuracy=accuracy, verdict=verdict, sentence=sentence)


def thoughts_of(arm: ArmSummary, rows: Sequence[GradeRow], token_ids: Sequence[Sequence[int]]) -> Thoughts:
    """The thoughts of an arm: its graded rows and the generated ids of its samples (any order)."""
    own = [row for row in rows if row.arm == arm.name]
    if not own or len(own) != len(token_ids):
        raise ValueError(f"arm {arm.name!r} has {len(own)} grades and {len(token_ids)} samples: give all of both")
    return Thoughts(
        thinking_tokens=fmean(_length(row) for row in own),
        closed=fmean(row.state in ("closed", "empty") for row in own),
        truncated=arm.truncated,
        loops=fmean(loop_at_end(list(ids)).length > 0 for ids in token_ids),
        repetition=fmean(longest_repeat(ids) / max(1, len(ids)) for ids in token_ids),
    )


def percent_change(ratio: float) -> str:
    """
    >>> percent_change(0.734), percent_change(1.05), percent_change(0.9999)
    ('-26.6%', '+5.0%', '0.0%')
    """
    text = f"{100 * (ratio - 1):+.1f}"
    return ("0.0" if float(text) == 0 else text) + "%"


def _length(row: GradeRow) -> int:
    return row.total_tokens if row.thinking_tokens is None else row.thinking_tokens


def _tokens_by_problem(rows: Sequence[GradeRow], arm: str) -> list[float]:
    by_problem: dict[str, list[int]] = {}
    for row in rows:
        if row.arm == arm:
            by_problem.setdefault(row.problem_id, []).append(_length(row))
    return [fmean(by_problem[name]) for name in sorted(by_problem)]
