"""The stated mis-exit rate of an arm held against what a run shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reasoning_evals.comparing import lost_answers
from reasoning_evals.runs import GradeRow


def mis_exits(arm: Mapping[str, Any], rows: Iterable[GradeRow], baseline: str, name: str) -> dict[str, Any] | None:
    """Of an arm that ends thoughts on a probe: the stated rate, the share of samples that were right and no longer are, with its
    interval over problems, and both in a sentence. None for other arms. ``arm``: its entry in run.json."""
    rules = [rule for rule in arm["details"].get("decoding", ()) if rule["rule"] == "probe_exit"]
    if not rules:
        return None
    calibration = rules[0]["calibration"]
    seen = lost_answers(rows, baseline, name)
    sentence = (
        f"{name}: states that it loses at most {100 * calibration['rate']:g}% of a problem's samples in expectation; here it lost "
        f"{100 * seen.mean:.1f}% ({100 * max(0.0, seen.low):.1f} to {100 * seen.high:.1f}) that {baseline} solved"
    )
    numbers = {key: getattr(seen, key) for key in ("mean", "low", "high", "num_problems")}
    return {"stated": calibration["rate"], "seen": numbers, "calibration": calibration, "sentence": sentence}


def exit_warnings(found: Mapping[str, Mapping[str, Any]], sampling: Mapping[str, Any]) -> list[str]:
    """What voids a stated rate: other sampling than that of the calibration, or a run that shows a higher one."""
    said = []
    for name, one in found.items():
        made = one["calibration"]["sampling"]
        other = sorted(key for key in made if key in sampling and made[key] != sampling[key])
        if other and not (made.get("greedy") and sampling.get("greedy")):
            said.append(
                f"{name}: its mis-exit rate was stated for {other[0]} {made[other[0]]}, this run has {sampling[other[0]]}: it need not hold"
            )
        if one["seen"]["low"] > one["stated"]:
            said.append(
                f"{name}: more right answers were lost than the stated rate allows: these problems are of another kind than those that "
                "calibrated it; calibrate it on problems like these"
            )
    return said
