"""Words of ``moe-steer plan``: those that change which experts are chosen (--force-in, --force-out, --logit-bias, --top-k), and the gate on the
entries that the command makes (--when)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_steer import ExpertGain, ResidualVector, SteeringPlan, TopK
from moe_steer.gates.conditions import When
from moe_steer.json_files import parse_json


def with_gate(plan: SteeringPlan, text: str | None, start: str | None, from_out: Callable[[Path], str]) -> SteeringPlan:
    """The plan with the gate of a JSON text on what the plan file ``start`` did not have. ``from_out``: what a file is called from the
    new plan's folder, which is the plan's ``base_dir``. ValueError for a gate that cannot be, and where there is nothing to gate."""
    if text is None:
        return plan
    when = When.of(parse_json(text, "--when", "write it as one JSON object in quotes"))
    when = when.renamed(lambda file: from_out(Path(file)))
    had = SteeringPlan.load(start) if start else SteeringPlan()
    old = {(one.layer, one.expert) for one in had.experts}
    first = len(had.residual)
    if all((one.layer, one.expert) in old for one in plan.experts) and first == len(plan.residual):
        raise ValueError("--when gates the entries made here, and there are none: name experts or --residual")
    experts = [one if (one.layer, one.expert) in old else dataclasses.replace(one, when=when) for one in plan.experts]
    residual = [*plan.residual[:first], *(dataclasses.replace(one, when=when) for one in plan.residual[first:])]
    gated = dataclasses.replace(plan, experts=experts, residual=residual)
    for one in when.conditions:
        if one.file:
            gated.probe(one.file)
    return gated


def gate_words(entry: ExpertGain | ResidualVector) -> str:
    """The gate of an entry, to follow on its line; empty without one."""
    return "" if entry.when is None else f" when {entry.when}"


def with_choice(
    plan: SteeringPlan,
    forced_in: Sequence[str],
    forced_out: Sequence[str],
    logit_bias: Sequence[str],
    top_k: Sequence[str],
) -> SteeringPlan:
    """The plan with what the words say; an expert that it names already keeps its gain. ValueError for words that say nothing,
    or say two things about one expert."""
    entries = {(entry.layer, entry.expert): entry for entry in plan.experts}
    for force, words in (("in", forced_in), ("out", forced_out)):
        for word in words:
            key = _expert(word, r"(\d+):(\d+)", f"--force-{force}", "LAYER:EXPERT, for example 3:17")
            at = entries.get(key)
            if at is not None and at.force not in (None, force):
                raise ValueError(f"--force-{force} {word}: that expert is forced {at.force} already, name it once")
            entries[key] = ExpertGain(*key, force=force) if at is None else dataclasses.replace(at, force=force)
    for word in logit_bias:
        shown = "LAYER:EXPERT=BIAS, for example 5:9=1.5"
        key = _expert(word, r"(\d+):(\d+)=(?:.+)", "--logit-bias", shown)
        try:
            bias = float(word.partition("=")[2])
        except ValueError:
            raise ValueError(f"--logit-bias {word}: the bias is not a number, write {shown}") from None
        if not bias:
            raise ValueError(f"--logit-bias {word} changes nothing: give another number than 0, or leave it out")
        at = entries.get(key)
        entries[key] = ExpertGain(*key, logit_bias=bias) if at is None else dataclasses.replace(at, logit_bias=bias)
    numbers = {entry.layer: entry for entry in plan.top_k}
    for word in top_k:
        match = re.fullmatch(r"(\d+)=(\d+)(?:@(.+))?", word)
        if match is None:
            raise ValueError(f"--top-k {word!r}: write LAYER=K or LAYER=K@SCOPE, for example 3=4@thought")
        one = TopK(int(match[1]), int(match[2]), match[3] or plan.scope)
        numbers[one.layer] = one
    return dataclasses.replace(plan, experts=tuple(entries.values()), top_k=tuple(numbers.values()))


def _expert(word: str, pattern: str, option: str, shown: str) -> tuple[int, int]:
    match = re.fullmatch(pattern, word)
    if match is None:
        raise ValueError(f"{option} {word!r} names no expert: write {shown}")
    return int(match[1]), int(match[2])
