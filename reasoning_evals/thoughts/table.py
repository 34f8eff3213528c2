"""The summary of thoughts as a table for a terminal, and notes: what could not be measured, and which numbers mean little."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_steer.console import aligned, counted
from reasoning_evals.report import count, minus, percent, signed_count, signed_points
from reasoning_evals.thoughts.summary import ArmThinking, ThinkingChange, ThinkingSummary, ThinkingValue
from reasoning_evals.thoughts.traced import MEASURES, TracedSample

COLUMNS = {
    "accuracy": "correct",
    "thinking_tokens": "thinking",
    "closed": "closed",
    "attempts": "attempts",
    "stated": "stated",
    "chance": "chance",
    "first_right_at": "first at",
    "outcome_efficiency": "outcome",
    "new_answer_share": "new answer",
    "underthinking": "under",
}
_KINDS = {measure.name: measure.kind for measure in MEASURES}
LEGEND = (
    "stated: thoughts that state the right answer; chance: that of another problem; first at: tokens up to the first right one",
    "outcome: efficiency (arXiv 2412.21187); under: underthinking of wrong responses (2501.18585); both by rule, compare arms only",
    "new answer: tokens of attempts that state a new answer; not the paper's process efficiency, whose clusters are solutions",
)

MEANINGLESS = 0.2
"""False-positive rate ("chance") above which a note says that a right answer in a thought means little; also if it is half of
``stated``. Our choice."""


def thinking_lines(summary: ThinkingSummary) -> list[str]:
    """Two lines an arm: its means, and below them the 95% interval (baseline) or the change with its interval (other arms)."""
    k = summary.num_samples
    over = f", in {summary.num_clusters} clusters" if summary.num_clusters else ""
    title = f"{counted(summary.num_problems, 'problem')} x {counted(k, 'sample')}{over}; 95% intervals over "
    title += "clusters" if over else "problems"
    if len(summary.arms) > 1:
        title += f"; changes against {summary.baseline}, paired"
    rows = [["", *COLUMNS.values()]]
    for arm in summary.arms:
        rows.append([arm.name, *(_mean(name, arm.values[name]) for name in COLUMNS)])
        rows.append(_below(arm, arm.name == summary.baseline))
    return [title, *aligned(rows, left=1), *LEGEND]


def _below(arm: ArmThinking, is_baseline: bool) -> list[str]:
    if is_baseline:
        return ["  95%", *(_interval(name, arm.values[name]) for name in COLUMNS)]
    return ["  change", *(_change(name, arm.changes[name]) for name in COLUMNS)]


def _mean(name: str, value: ThinkingValue | None) -> str:
    return "–" if value is None else _number(name, value.mean)


def _interval(name: str, value: ThinkingValue | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "–"
    return f"{_number(name, value.low).rstrip('%')} to {_number(name, value.high).rstrip('%')}"


def _change(name: str, change: ThinkingChange | None) -> str:
    """A change with half the width of its interval, or with both ends if it is not symmetric; without interval where all
    problems changed alike."""
    if change is None:
        return "–"
    mean = _signed(name, change.mean)
    if change.low is None or change.high is None:
        return mean
    if not math.isclose(change.high - change.mean, change.mean - change.low, rel_tol=1e-6):
        return f"{mean} ({_signed(name, change.low)} to {_signed(name, change.high)})"
    half = (change.high - change.low) / 2
    return f"{mean} ±{_number(name, half).rstrip('%')}"


def _signed(name: str, value: float) -> str:
    if _KINDS[name] == "share":
        return signed_points(value)
    return signed_count(value) if _KINDS[name] == "tokens" else minus(f"{value:+.2f}")


def _number(name: str, value: float) -> str:
    if _KINDS[name] == "share":
        return percent(value)
    return count(value) if _KINDS[name] == "tokens" else f"{value:.2f}"


def thinking_notes(samples: Sequence[TracedSample], summary: ThinkingSummary) -> list[str]:
    """Notes for a careful reader; empty if there is no problem."""
    return [
        *_alone(summary),
        *_thoughtless(summary),
        *_unjudged(samples),
        *_chance(summary),
        *_no_wrong_answers(summary),
        *_failed(samples),
        *_intervals(summary),
    ]


def _alone(summary: ThinkingSummary) -> list[str]:
    if len(summary.arms) > 1:
        return []
    return [
        f"{summary.baseline} is the only arm: nothing is compared; give the folder of another one with --arm-folder"
    ]


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


def _failed(samples: Sequence[TracedSample]) -> list[str]:
    failed = sum(sample.row.outcome == "grader_error" for sample in samples)
    lost = f"the grader failed at {failed} of {len(samples)} responses: they are not taken for wrong ones"
    return [lost] if failed else []


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
