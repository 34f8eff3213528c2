"""What an arm does to a loaded model: a plan from its file, and the context in which it steers.

Also the words of a plan that change which experts are chosen: --force-in, --force-out, --logit-bias, --top-k of ``moe-steer plan``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe_steer import ExpertGain, SteeringPlan, TopK, steer

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape
    from reasoning_evals.runs import Arm


def load_plan(path: str) -> SteeringPlan:
    """The plan of a file; ValueError as ``SteeringPlan.load``, and for a neutral plan."""
    plan = SteeringPlan.load(path)
    if plan.is_neutral:
        raise ValueError(f"the plan {path!r} is neutral (all gains 1, all strengths 0): there is nothing to compare")
    return plan


def check_fits(plan: SteeringPlan, shape: ModelShape | None, source: str) -> None:
    """ValueError, which begins with where the plan is from, for one that does not fit the model (None: not known yet)."""
    if shape is None:
        return
    try:
        plan.check(shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def steering(model: Any, tokenizer: Any, plan: SteeringPlan) -> Callable[[], Any]:
    """The context in which the model is steered; the run keeps its audit."""
    return lambda: steer(model, plan, tokenizer=tokenizer, quiet=True)


def arm_here(name: str, model: Any, tokenizer: Any, plan: SteeringPlan | None) -> Arm:
    """A loaded model under a plan, or as it is; ValueError for a plan that does not fit."""
    from reasoning_evals.engines import InProcessSampler
    from reasoning_evals.runs import Arm

    sampler = InProcessSampler(model, tokenizer)
    if plan is None:
        return Arm(name, sampler, details={"plan": None})
    plan.check(model)
    return Arm(name, sampler, context=steering(model, tokenizer, plan), details={"plan": plan.digest()})


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
