"""What the measures of thoughts do not say, one line each: what could not be measured, and what means little."""

from __future__ import annotations

from collections.abc import Sequence

from reasoning_evals.thinking_summary import ThinkingSummary
from reasoning_evals.traced_thoughts import TracedSample

MEANINGLESS = 0.2
"""Chance rate from which a right answer in a thought is said to mean little; also where it is half of ``stated``. Our choice."""


def thinking_notes(samples: Sequence[TracedSample], summary: ThinkingSummary, num_timeouts: int = 0) -> list[str]:
    """Sentences for a careful reader, none where nothing is wrong. ``num_timeouts``: of the judge that traced the samples."""
    return [
        *_alone(summary),
        *_thoughtless(summary),
        *_unjudged(samples),
        *_chance(summary),
        *_no_wrong_answers(summary),
        *_failed(samples, num_timeouts),
        *_intervals(summary),
    ]


def _alone(summary: ThinkingSummary) -> list[str]:
    if len(summary.arms) > 1:
        return []
    return [f"{summary.baseline} is the only arm: nothing is compared; give the folder of another one with --arm"]


def _thoughtless(summary: ThinkingSummary) -> list[str]:
    lines = [
        f"{arm.name} holds no thoughts: only its accuracy is known" for arm in summary.arms if not arm.num_thoughts
    ]
    some = [
        f"{arm.num_samples - arm.num_thoughts} of {arm.num_samples} of {arm.name}"
        for arm in summary.arms
        if 0 < arm.num_thoughts < arm.num_samples
    ]
    if some:
        lines.append(f"samples without a thought, from attempts on left out: {', '.join(some)}")
    return lines


def _unjudged(samples: Sequence[TracedSample]) -> list[str]:
    problems: dict[str, dict[str, None]] = {}
    for sample in samples:
        if sample.unjudged:
            problems.setdefault(sample.unjudged, {})[sample.row.problem_id] = None
    lines = [
        f"{reason}: {len(names)} ({_some(list(names))}), from stated on left out" for reason, names in problems.items()
    ]
    if boxed := {sample.row.problem_id for sample in samples if sample.boxed_only}:
        lines.append(
            f"problems that ask for a formula or a list: {len(boxed)}, seen in boxes and after 'answer is' alone, so stated is a lower bound"
        )
    return lines


def _chance(summary: ThinkingSummary) -> list[str]:
    spoilt, unknown = [], []
    for arm in summary.arms:
        chance, stated = arm.values["chance"], arm.values["stated"]
        if stated and not chance:
            unknown.append(arm.name)
        if stated and chance and chance.mean >= min(MEANINGLESS, stated.mean / 2) > 0:
            spoilt.append(f"{arm.name} {100 * chance.mean:.1f}%")
    lines = []
    if spoilt:
        lines.append(
            f"thoughts often state the answer to ANOTHER problem ({', '.join(spoilt)}): a right one means little there"
        )
    if unknown:
        lines.append(
            f"no chance rate ({', '.join(unknown)}): no problem has another answer of the same type to look for"
        )
    return lines


def _no_wrong_answers(summary: ThinkingSummary) -> list[str]:
    arms = [arm.name for arm in summary.arms if arm.values["stated"] and not arm.values["underthinking"]]
    return [f"no response is wrong, so none underthinks: {', '.join(arms)}"] if arms else []


def _failed(samples: Sequence[TracedSample], num_timeouts: int) -> list[str]:
    lines = []
    if failed := sum(sample.row.outcome.startswith("grader_") for sample in samples):
        lines.append(f"the grader failed at {failed} of {len(samples)} responses: they are not taken for wrong ones")
    if num_timeouts:
        lines.append(f"{num_timeouts} answers within thoughts ran into the grader's time limit: taken for wrong")
    return lines


def _intervals(summary: ThinkingSummary) -> list[str]:
    single = sorted({name for arm in summary.arms for name, one in arm.values.items() if one and one.low is None})
    lines = [f"no interval over a single problem: {', '.join(single)}"] if single else []
    unpaired = [
        f"{name} of {arm.name}"
        for arm in summary.arms
        for name, change in arm.changes.items()
        if change is None and arm.values[name] and _baseline_has(summary, name)
    ]
    if unpaired:
        lines.append(
            f"no change can be given where fewer than two problems have a value in both arms: {_some(unpaired, 4)}"
        )
    return lines


def _baseline_has(summary: ThinkingSummary, name: str) -> bool:
    return any(arm.name == summary.baseline and arm.values[name] for arm in summary.arms)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
