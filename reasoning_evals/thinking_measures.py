"""What is measured on the thought of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from reasoning_evals.thinking_metrics import ThoughtTrace, oe_rule, process_efficiency, ut_rule
from reasoning_evals.traced_thoughts import TracedSample


class ThinkingMeasure(NamedTuple):
    """One column of the summary."""

    name: str
    kind: str
    """share (0 to 1), tokens or count."""
    of: Callable[[TracedSample], float | None]
    """Its value for a sample; None where it does not apply."""


def _judged(rule: Callable[[ThoughtTrace], float | None]) -> Callable[[TracedSample], float | None]:
    """A rule over attempts, for thoughts whose stated answers can be judged."""
    return lambda sample: None if sample.trace is None or sample.unjudged else rule(sample.trace)


def _thinking_tokens(sample: TracedSample) -> float:
    """As generated; counted in the text where the sampler did not know its tags."""
    if sample.row.thinking_tokens is not None:
        return sample.row.thinking_tokens
    return sample.trace.tokens if sample.trace else 0


def _underthinking(sample: TracedSample) -> float | None:
    """For incorrect responses alone; an answer at which the grader failed is not known to be one."""
    if sample.trace is None or sample.unjudged or sample.row.outcome not in ("wrong", "no_answer", "truncated"):
        return None
    return ut_rule([sample.trace])


MEASURES = (
    ThinkingMeasure("accuracy", "share", lambda sample: sample.row.correct),
    ThinkingMeasure("thinking_tokens", "tokens", _thinking_tokens),
    ThinkingMeasure("closed", "share", lambda sample: sample.row.state in ("closed", "empty")),
    ThinkingMeasure("truncated", "share", lambda sample: sample.row.outcome == "truncated"),
    ThinkingMeasure("attempts", "count", lambda sample: len(sample.trace.attempts) if sample.trace else None),
    ThinkingMeasure("stated", "share", _judged(lambda trace: trace.first_correct_token is not None)),
    ThinkingMeasure("chance", "share", lambda sample: sample.chance),
    ThinkingMeasure("first_right_at", "tokens", _judged(lambda trace: trace.first_correct_token)),
    ThinkingMeasure("tokens_after_first_right", "tokens", _judged(lambda trace: trace.tokens_after_first_correct)),
    ThinkingMeasure("outcome_efficiency", "share", _judged(lambda trace: oe_rule([trace]))),
    ThinkingMeasure("process_efficiency", "share", _judged(lambda trace: process_efficiency([trace]))),
    ThinkingMeasure("underthinking", "share", _underthinking),
    ThinkingMeasure("answer_changes", "count", _judged(lambda trace: trace.answer_changes)),
    ThinkingMeasure("right_to_wrong", "count", _judged(lambda trace: trace.correct_to_wrong)),
    ThinkingMeasure("revisit_rate", "share", _judged(lambda trace: trace.revisit_rate)),
)
"""Attempts and what follows are of samples with a thought; first_right_at and tokens_after_first_right of thoughts that state
the right answer. The rules: ``thinking_metrics``."""
