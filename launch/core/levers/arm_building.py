"""The arms of an evaluation: their words put together with a model, or with the server that holds it. And what
rules that end thoughts early did, as audit rows of a run, beside those of a plan.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from launch.core.levers.arm_rules import ArmParts, add_rule, held_by_prompt
from launch.core.levers.arm_words import USUAL_WORDS, Rule, Words, arm_name, parse_arm
from launch.core.levers.exit_probe import reading_of
from launch.core.session import Session, steering
from launch.core.wiring import load_plan
from moe_steer import SteeringPlan, preset_plan
from reasoning_evals.decoding import ProbeExit
from reasoning_evals.engines import InProcessSampler
from reasoning_evals.runs import Arm
from reasoning_evals.thoughts import HELD


class BuiltArm(NamedTuple):
    """An arm to run, and its plan, if it has one."""

    arm: Arm
    plan: SteeringPlan | None


def load_plans(words: Sequence[str]) -> dict[str, SteeringPlan]:
    """Word -> plan, for the arms that have one; ValueError as ``SteeringPlan.load``, and for a neutral plan."""
    found = {}
    for word in words:
        for rule in parse_arm(word):
            if rule.kind == "plan":
                found[word] = load_plan(rule.text)
            elif rule.kind == "preset":
                found[word] = preset_plan(rule.text)
    return found


def arm_of(session: Session, word: str, plan: SteeringPlan | None = None, words: Words = USUAL_WORDS) -> BuiltArm:
    """The arm of a word in a job, as ``build_arm`` makes it. ValueError for a rule of decoding where a server decodes."""
    if session.connection is None:
        return build_arm(word, session.model, session.tokenizer, plan, words)
    rules, parts = parts_of(word, session.tokenizer, plan, words)
    if parts.processors:
        raise ValueError(
            f"the arm {word!r} is a rule of decoding, which runs in this process and not on a server: leave it out, or leave "
            f"--{session.options.held_by} out"
        )
    arm = session.arm(arm_name(rules), plan)
    return BuiltArm(dataclasses.replace(arm, details=parts.details, render=parts.render), plan)


def build_arm(word: str, model: Any, tokenizer: Any, plan: SteeringPlan | None, words: Words = USUAL_WORDS) -> BuiltArm:
    """The arm of a word. Its details name every setting, token ids included, so that a run is not resumed under others.

    ValueError when the plan does not fit the model, or the tokenizer cannot write a word.
    """
    if plan is not None:
        plan.check(model)
    rules, parts = parts_of(word, tokenizer, plan, words)
    sampler = InProcessSampler(model, tokenizer, processors=_processor_list(parts.processors))
    context: Callable[[], AbstractContextManager[Any]]
    context = nullcontext if plan is None else steering(model, tokenizer, plan)
    for rule in parts.processors:
        if isinstance(rule, ProbeExit):
            context = reading_of(rule).context(model)
    if counting := [rule for rule in parts.processors if hasattr(rule, "counts")]:
        context = functools.partial(counted_exits, context, counting)
    return BuiltArm(Arm(arm_name(rules), sampler, context, parts.details, parts.render), plan)


def parts_of(
    word: str, tokenizer: Any, plan: SteeringPlan | None, words: Words = USUAL_WORDS
) -> tuple[tuple[Rule, ...], ArmParts]:
    """The rules of a word, and what they add up to under a tokenizer. ValueError when it cannot write a word."""
    rules = parse_arm(word)
    parts = ArmParts(plan=plan, details={"plan": plan.digest() if plan else None})
    # What leaves one token comes last: no other rule may take that away.
    for rule in sorted(rules, key=lambda rule: _LAST.get(rule.kind, 0)):
        add_rule(parts, rule, tokenizer, words)
    if any(rule.kind in ("budget", "soft") for rule in rules):
        parts.details[HELD] = held_by_prompt(tokenizer, parts.render)
    if parts.processors:
        parts.details["decoding"] = [processor.describe() for processor in parts.processors]
    return rules, parts


_LAST = {"remind": 1, "budget": 2, "soft": 2}


def _processor_list(processors: Sequence[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors) if processors else None


class _Counted:
    def __init__(self, plan: Any, rules: Sequence[Any]) -> None:
        self._plan, self._rules = plan, rules
        self._before = [Counter(rule.counts) for rule in rules]

    def to_rows(self) -> list[dict[str, Any]]:
        """The plan's rows, and one of each rule: its trials and the tokens that they cost, and the thoughts that it ended."""
        rows = self._plan.to_rows() if hasattr(self._plan, "to_rows") else []
        for rule, before in zip(self._rules, self._before, strict=True):
            now = {name: number - before[name] for name, number in rule.counts.items()}
            rows.append({"kind": "exit", "rule": rule.describe()["rule"], **dict(sorted(now.items()))})
        return rows

    def to_samples(self) -> dict[Any, list[dict[str, Any]]]:
        """The plan's."""
        return self._plan.to_samples() if hasattr(self._plan, "to_samples") else {}


@contextmanager
def counted_exits(context: Callable[[], AbstractContextManager[Any]], rules: Sequence[Any]) -> Iterator[_Counted]:
    """The context of an arm's plan, and what its rules count while it is open."""
    with context() as plan:
        yield _Counted(plan, rules)
