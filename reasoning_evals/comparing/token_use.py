"""Shorter thoughts and their price: length as a ratio to the baseline, accuracy against a margin, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from reasoning_evals.comparing.comparison import ArmSummary, Difference, Length, PairSummary
from reasoning_evals.comparing.pairing import ESTIMAND
from reasoning_evals.comparing.verdicts import ALPHA, FEWER_TOKENS, HURT, MORE_TOKENS, NO_INTERVAL, p_text, points
from reasoning_evals.runs import GradeRow
from reasoning_evals.thinking import longest_repeat, loop_at_end

SHORTER_HELD, SHORTER_OPEN, SHORTER_LOST = (
    "shorter, accuracy held",
    "shorter, accuracy not settled",
    "shorter, accuracy lost",
)
LONGER, SAME = "longer", "no change in length shown"
MARGIN = 0.03
"""Loss of accuracy that still counts as "held": the lower end of the difference must stay above its negative."""


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
    tokens: Length
    accuracy: Difference
    verdict: str
    sentence: str


def efficiency(pair: PairSummary) -> Efficiency:
    """Judge a compared arm by length and by accuracy.

    Shorter or longer is the verdict on length, "lost" that on accuracy, both after Holm over the pairs of the comparison. "Held"
    means that the lower end of the accuracy difference stays above -`MARGIN`: of the 95% interval, and of the exact bound that
    reckons with few problems that lose much (``loss_bound``), so that 100 problems or more are needed to hold 3 points where no
    arm gains. "Not settled" is neither. ValueError for a pair whose first arm has no tokens.
    """
    length, accuracy = pair.length, pair.accuracy
    if length is None:
        raise ValueError(f"arm {pair.a!r} has no tokens: there is nothing to compare lengths with")
    if length.verdict == MORE_TOKENS:
        verdict = LONGER
    elif length.verdict != FEWER_TOKENS:
        verdict = SAME
    elif pair.verdict == HURT:
        verdict = SHORTER_LOST
    else:
        verdict = SHORTER_HELD if accuracy.loss_bound > -MARGIN else SHORTER_OPEN
    between = f"{points(accuracy.low)} to {points(accuracy.high)}"
    if accuracy.low == accuracy.high:
        between = f"{NO_INTERVAL}: all problems moved alike"
    sentence = (
        f"{pair.b}: {verdict}. {'Thinking tokens' if length.of_thoughts else 'All tokens'} {percent_change(length.ratio)} "
        f"({length_interval(length)}; {ESTIMAND}), accuracy {points(accuracy.mean)} points ({between})."
    )
    if length.holm_p >= ALPHA > length.p_value:
        word = "fewer" if length.ratio < 1 else "more"
        sentence += f" Nominally {word} tokens ({p_text(length.p_value)}), not after Holm ({p_text(length.holm_p)})."
    if verdict == SHORTER_OPEN:
        sentence += f" Up to {points(-accuracy.loss_bound).lstrip('+')} points may be lost, {100 * MARGIN:g} would count as held."
    if cut := cut_lengths(pair):
        sentence += f" {cut}"
    return Efficiency(arm=pair.b, tokens=length, accuracy=accuracy, verdict=verdict, sentence=sentence)


def cut_lengths(pair: PairSummary) -> str:
    """Says that lengths are lower bounds, where the token limit cut samples."""
    if not pair.cut_a and not pair.cut_b:
        return ""
    shares = f"{100 * pair.cut_b:.1f}% of its samples and {100 * pair.cut_a:.1f}% of those of {pair.a}"
    return f"The token limit cut {shares}: their lengths are lower bounds."


def length_interval(length: Length) -> str:
    """The interval of a ratio as changes in percent; left out where there is none."""
    if length.low is None or length.high is None:
        return NO_INTERVAL
    return f"{percent_change(length.low)} to {percent_change(length.high)}"


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
