"""The arms of an evaluation, written as words: ``baseline``, ``plan:plan.json``, ``tip:3,600``, ``nowait``, ``budget:64``, ...

A word may be several rules joined by ``+``: ``plan:plan.json+budget:64``. Also the words of a plan that change which experts are
chosen: --force-in, --force-out, --logit-bias, --top-k of ``moe-steer plan``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from expert_stats import MarkerSet
from launch.core.options import BASELINE
from moe_steer import ExpertGain, SteeringPlan, TopK, steer
from moe_steer.presets import preset_plan
from moe_steer.thinking import TokenTags, thinking_format, token_tags
from reasoning_evals.decoding import NOWAIT_WORDS, Ban, Continuation, SwitchPenalty, ThinkingBudget
from reasoning_evals.engines import InProcessSampler
from reasoning_evals.prompts import (
    THINKING_PROMPT,
    RenderedPrompt,
    prompt_before_thought,
    prompt_inside_thought,
    prompt_with_effort,
    prompt_with_empty_thought,
    prompt_without_thinking,
)
from reasoning_evals.runs import Arm

RULES = {
    BASELINE: "baseline, the model as it is",
    "plan": "plan:FILE, a steering plan",
    "preset": "preset:NAME, published experts",
    "prompt-before": "prompt-before, the thinking prompt before the tag that opens the thought",
    "prompt-after": "prompt-after, the thinking prompt after that tag",
    "no-thinking": "no-thinking, a thought that says it is finished",
    "thinking-off": "thinking-off, by the chat template's own switch",
    "effort": "effort:WORD, the model's own word for how hard to think",
    "tip": "tip or tip:ALPHA,BETA, the penalty on switch words",
    "tip-close": "tip-close or tip-close:ALPHA,BETA, the same penalty on the closing tag",
    "nowait": "nowait, the ban of NoWait's words",
    "budget": "budget:N, the closing tag after N tokens of thought",
    "continue": "continue:N, a word in place of the closing tag before N tokens of thought",
}
"""What an arm can be made of."""
_PROMPTS = ("prompt-before", "prompt-after", "no-thinking", "thinking-off", "effort")
_GROUPS = {"plan": "plan", "preset": "plan", **dict.fromkeys(_PROMPTS, "prompt")}
_NAMED = ("plan", "preset", "effort")


class Rule(NamedTuple):
    """One word of an arm, checked."""

    kind: str
    text: str = ""
    """File of a plan, name of a preset, word of an effort."""
    numbers: tuple[float, ...] = ()


class Words(NamedTuple):
    """What the rules act on, as text; token ids are looked up in the tokenizer."""

    switch: Sequence[str] = ("Alternatively",)
    banned: Sequence[str] = NOWAIT_WORDS
    thinking_prompt: str = THINKING_PROMPT
    go_on: str = "Wait"


class BuiltArm(NamedTuple):
    """An arm to run, and its plan, if it has one."""

    arm: Arm
    plan: SteeringPlan | None


@dataclass
class ArmParts:
    """What the rules of one arm add up to."""

    plan: SteeringPlan | None = None
    render: Callable[[str], RenderedPrompt] | None = None
    processors: list[Any] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def parse_arm(word: str) -> tuple[Rule, ...]:
    """``tip:3,600+budget:64`` -> its rules; ValueError in one line says what is wrong with the word."""
    rules = tuple(_rule(part, word) for part in word.split("+"))
    groups = [_GROUPS.get(rule.kind, rule.kind) for rule in rules]
    if len(set(groups)) < len(groups):
        raise ValueError(
            f"the arm {word!r} has two rules of the same kind: give one plan, one prompt, one of each rule"
        )
    lengths = {rule.kind: rule.numbers[0] for rule in rules if rule.kind in ("budget", "continue")}
    if len(lengths) == 2 and lengths["budget"] <= lengths["continue"]:
        raise ValueError(
            f"the arm {word!r} ends its thought before it may end: give a budget above the length to go on to"
        )
    if len(rules) > 1 and BASELINE in groups:
        raise ValueError(f"the arm {word!r}: {BASELINE} is the model without any rule; leave it out")
    return rules


def check_rule(word: str, instead: str) -> None:
    """ValueError when a word is wrong, or names a plan, which has a place of its own, ``instead``."""
    if any(_GROUPS.get(rule.kind) == "plan" for rule in parse_arm(word)):
        raise ValueError(f"the arm {word!r} names a plan: give that as {instead}")


def arm_name(rules: Iterable[Rule]) -> str:
    """How the arm is called in the run and in the report; a plan goes by the name of its file, without folder and ending."""

    def one(rule: Rule) -> str:
        text = Path(rule.text).stem if rule.kind == "plan" else rule.text or ",".join(f"{n:g}" for n in rule.numbers)
        return f"{rule.kind}:{text}" if text else rule.kind

    return "+".join(one(rule) for rule in rules)


def check_arms(words: Sequence[str]) -> None:
    """ValueError when a word is wrong, two arms would have one name, or there are fewer than two."""
    names = [arm_name(parse_arm(word)) for word in words]
    if len(names) < 2:
        raise ValueError(f"arms are {list(words)}: give at least two, a comparison needs them")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two arms are named {twice[0]!r}: give each arm once, and plan files of different names")


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


def load_plan(path: str) -> SteeringPlan:
    """The plan of a file; ValueError as ``SteeringPlan.load``, and for a neutral plan."""
    plan = SteeringPlan.load(path)
    if plan.is_neutral:
        raise ValueError(f"the plan {path!r} is neutral (all gains 1, all strengths 0): there is nothing to compare")
    return plan


def build_arm(word: str, model: Any, tokenizer: Any, plan: SteeringPlan | None, words: Words) -> BuiltArm:
    """The arm of a word. Its details name every setting, token ids included, so that a run is not resumed under others.

    ValueError when the plan does not fit the model, or the tokenizer cannot write a word.
    """
    if plan is not None:
        plan.check(model)
    rules, parts = parts_of(word, tokenizer, plan, words)
    sampler = InProcessSampler(model, tokenizer, processors=_processor_list(parts.processors))
    context = nullcontext if plan is None else steering(model, tokenizer, plan)
    return BuiltArm(Arm(arm_name(rules), sampler, context, parts.details, parts.render), plan)


def parts_of(word: str, tokenizer: Any, plan: SteeringPlan | None, words: Words) -> tuple[tuple[Rule, ...], ArmParts]:
    """The rules of a word, and what they add up to under a tokenizer. ValueError when it cannot write a word."""
    rules = parse_arm(word)
    parts = ArmParts(plan=plan, details={"plan": plan.digest() if plan else None})
    # A budget comes last: no other rule may take away the tag that it forces.
    for rule in sorted(rules, key=lambda rule: rule.kind == "budget"):
        _add(parts, rule, tokenizer, words)
    if parts.processors:
        parts.details["decoding"] = [processor.describe() for processor in parts.processors]
    return rules, parts


def _add(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    def tags() -> TokenTags:
        found = token_tags(tokenizer)
        if found is None:
            raise ValueError(
                f"the rule {rule.kind} acts on thoughts, and {thinking_format(tokenizer).describe()}: leave it out, or name the "
                "tags with --thinking"
            )
        return found

    if rule.kind in ("tip", "tip-close"):
        alpha = rule.numbers[0] if rule.numbers else SwitchPenalty.alpha
        beta = int(rule.numbers[1]) if len(rule.numbers) > 1 else SwitchPenalty.beta
        forms = token_forms(tokenizer, words.switch) if rule.kind == "tip" else (tags().close,)
        parts.processors.append(SwitchPenalty(forms=forms, tags=tags(), alpha=alpha, beta=beta))
    elif rule.kind == "nowait":
        spellings = [*words.banned, *(word.upper() for word in words.banned)]
        parts.processors.append(Ban(forms=token_forms(tokenizer, spellings)))
    elif rule.kind == "budget":
        parts.processors.append(ThinkingBudget(num_tokens=int(rule.numbers[0]), tags=tags()))
    elif rule.kind == "continue":
        form = tuple(tokenizer.encode(words.go_on, add_special_tokens=False))
        parts.processors.append(Continuation(num_tokens=int(rule.numbers[0]), word=form, tags=tags()))
    elif rule.kind in ("no-thinking", "thinking-off"):
        empty = rule.kind == "no-thinking"
        parts.render = prompt_with_empty_thought(tokenizer) if empty else prompt_without_thinking(tokenizer)
        parts.details["prompt_opens_thought"] = False
    elif rule.kind == "effort":
        parts.render = prompt_with_effort(tokenizer, rule.text)
    elif rule.kind in ("prompt-before", "prompt-after"):
        make = prompt_before_thought if rule.kind == "prompt-before" else prompt_inside_thought
        parts.render = make(tokenizer, words.thinking_prompt)
        parts.details |= {"thinking_prompt": words.thinking_prompt.strip(), "prompt_opens_thought": True}


def token_forms(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """All token forms of the words under a tokenizer: after a space, a newline, a bracket, at the start; first letter in
    either case."""
    markers = MarkerSet.from_tokenizer(tokenizer, tuple(dict.fromkeys(words)), whole_words=False)
    return tuple(form for marker in markers.markers for form in marker.forms)


def _rule(part: str, word: str) -> Rule:
    kind, colon, value = part.partition(":")
    if kind not in RULES:
        raise ValueError(f"the arm {word!r} has the unknown rule {kind!r}: choose among {'; '.join(RULES.values())}")
    if kind in _NAMED:
        if not value:
            raise ValueError(f"the arm {word!r} names no {kind}: write {RULES[kind]}")
        return Rule(kind, value)
    try:
        numbers = tuple(float(number) for number in value.split(",")) if colon else ()
    except ValueError:
        numbers = (float("nan"),)
    least, most = {"tip": (0, 2), "tip-close": (0, 2), "budget": (1, 1), "continue": (1, 1)}.get(kind, (0, 0))
    whole = numbers[:1] if kind in ("budget", "continue") else numbers[1:2]
    if not (
        least <= len(numbers) <= most
        and all(number > 0 or (number == 0 and kind == "budget") for number in numbers)
        and all(number.is_integer() for number in whole)
        and float("inf") not in numbers
    ):
        raise ValueError(f"the arm {word!r} has {part!r} in it: write {kind + ', ' if not most else ''}{RULES[kind]}")
    return Rule(kind, "", numbers)


def _processor_list(processors: Sequence[Any]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors) if processors else None


def steering(model: Any, tokenizer: Any, plan: SteeringPlan) -> Callable[[], Any]:
    """The context in which the model is steered; the run keeps its audit."""
    return lambda: steer(model, plan, tokenizer=tokenizer, quiet=True)


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
