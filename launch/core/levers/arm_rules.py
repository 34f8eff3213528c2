"""What each rule of an arm adds: its prompt, or its decoding rule under a tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from expert_stats import MarkerSet
from launch.core.levers.arm_words import Rule, Words
from launch.core.levers.exit_probe import ExitProbe, ProbeReading
from moe_steer import SteeringPlan
from moe_steer.thinking import TokenTags, thinking_format, token_tags, token_texts
from moe_steer.tokens.steps import ANY_STOP, LINE, SENTENCE, token_class
from reasoning_evals.decoding import (
    Ban,
    Continuation,
    Reminder,
    SoftBudget,
    SwitchPenalty,
    ThinkingBudget,
    TrialExit,
    open_thought,
)
from reasoning_evals.prompts import (
    RenderedPrompt,
    prompt_before_thought,
    prompt_inside_thought,
    prompt_with_effort,
    prompt_with_empty_thought,
    prompt_with_request,
    prompt_without_thinking,
    render_prompt,
)

PEAK = 10.0
"""Logits by which a soft budget raises the closing tag at its end, where the user names no number. Our choice."""


@dataclass
class ArmParts:
    """What the rules of one arm add up to."""

    plan: SteeringPlan | None = None
    render: Callable[[str], RenderedPrompt] | None = None
    processors: list[Any] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def add_rule(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    """Add a rule to the others of its arm. ValueError when the tokenizer cannot write a word of it, or the model cannot follow it."""
    if rule.kind in _PROMPTS:
        _PROMPTS[rule.kind](parts, rule, tokenizer, words)
    elif rule.kind in _DECODING:
        parts.processors.append(_DECODING[rule.kind](rule, tokenizer, words))


def _tags(rule: Rule, tokenizer: Any) -> TokenTags:
    found = token_tags(tokenizer)
    if found is None:
        raise ValueError(
            f"the rule {rule.kind} acts on thoughts, and {thinking_format(tokenizer).describe()}: leave it out, or name the "
            "tags with --thinking"
        )
    return found


def _penalty(rule: Rule, tokenizer: Any, words: Words) -> SwitchPenalty:
    alpha = rule.numbers[0] if rule.numbers else SwitchPenalty.alpha
    beta = int(rule.numbers[1]) if len(rule.numbers) > 1 else SwitchPenalty.beta
    tags = _tags(rule, tokenizer)
    forms = token_forms(tokenizer, words.switch_words) if rule.kind == "tip" else (tags.close,)
    return SwitchPenalty(forms=forms, tags=tags, alpha=alpha, beta=beta)


def _ban(rule: Rule, tokenizer: Any, words: Words) -> Ban:
    spellings = [*words.ban_words, *(word.upper() for word in words.ban_words)]
    return Ban(forms=(*token_forms(tokenizer, spellings), *token_spellings(tokenizer, words.ban_words)))


def _soft_budget(rule: Rule, tokenizer: Any, words: Words) -> SoftBudget:
    budget, *more = rule.numbers
    usual: tuple[float, ...] = (math.ceil(budget / 4), math.ceil(budget / 10), PEAK)
    ramp, grace, peak = (*more, *usual[len(more) :])
    tags = _tags(rule, tokenizer)
    return SoftBudget(
        num_tokens=int(budget), tags=tags, ramp=int(ramp), grace=int(grace), peak=peak, step_ends=step_ends(tokenizer)
    )


def _continuation(rule: Rule, tokenizer: Any, words: Words) -> Continuation:
    form = tuple(tokenizer.encode(words.go_on_word, add_special_tokens=False))
    return Continuation(num_tokens=int(rule.numbers[0]), word=form, tags=_tags(rule, tokenizer))


def _reminder(rule: Rule, tokenizer: Any, words: Words) -> Reminder:
    text = tuple(tokenizer(words.reminder, add_special_tokens=False)["input_ids"])
    tags = _tags(rule, tokenizer)
    if any(tags.at(text, place) for place in range(len(text))):
        raise ValueError(f"the reminder {words.reminder!r} holds a tag of the thought: give words alone")
    return Reminder(after=int(rule.numbers[0]), text=text, tags=tags)


def _trial_exit(rule: Rule, tokenizer: Any, words: Words) -> TrialExit:
    threshold = rule.numbers[0] if rule.numbers else TrialExit.threshold
    trials = int(rule.numbers[1]) if len(rule.numbers) > 1 else TrialExit.most_trials
    text = words.trial_prompt.replace("{close}", thinking_format(tokenizer).close)
    return TrialExit(
        forms=one_token_forms(tokenizer, words.exit_words),
        tags=_tags(rule, tokenizer),
        trial=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
        threshold=threshold,
        most_trials=trials,
        texts=token_texts(tokenizer),
    )


_DECODING: dict[str, Callable[[Rule, Any, Words], Any]] = {
    "tip": _penalty,
    "tip-close": _penalty,
    "nowait": _ban,
    "budget": lambda rule, tokenizer, _: ThinkingBudget(num_tokens=int(rule.numbers[0]), tags=_tags(rule, tokenizer)),
    "soft": _soft_budget,
    "continue": _continuation,
    "remind": _reminder,
    "deer": _trial_exit,
    "exit": lambda rule, tokenizer, _: ProbeReading(ExitProbe.load(rule.text)).rule(
        _tags(rule, tokenizer), step_ends(tokenizer)
    ),
}


def _closed_thought(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    empty = rule.kind == "no-thinking"
    parts.render = prompt_with_empty_thought(tokenizer) if empty else prompt_without_thinking(tokenizer)
    parts.details["prompt_opens_thought"] = False


def _effort(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    parts.render = prompt_with_effort(tokenizer, rule.text)


def _hint(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    if "{budget}" not in words.budget_hint:
        raise ValueError(
            f"the hint {words.budget_hint!r} does not say the budget: write {{budget}} where its number belongs"
        )
    parts.render = prompt_with_request(tokenizer, words.budget_hint.replace("{budget}", f"{rule.numbers[0]:g}"))
    parts.details["hint"] = words.budget_hint


def _thinking_prompt(parts: ArmParts, rule: Rule, tokenizer: Any, words: Words) -> None:
    make = prompt_before_thought if rule.kind == "prompt-before" else prompt_inside_thought
    parts.render = make(tokenizer, words.thinking_prompt)
    parts.details |= {"thinking_prompt": words.thinking_prompt.strip(), "prompt_opens_thought": True}


_PROMPTS: dict[str, Callable[[ArmParts, Rule, Any, Words], None]] = {
    "no-thinking": _closed_thought,
    "thinking-off": _closed_thought,
    "effort": _effort,
    "hint": _hint,
    "prompt-before": _thinking_prompt,
    "prompt-after": _thinking_prompt,
}


def token_forms(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """All token forms of the words under a tokenizer: after a space, a newline, a bracket, at the start; first letter in
    either case."""
    markers = MarkerSet.from_tokenizer(tokenizer, tuple(dict.fromkeys(words)), whole_words=False)
    return tuple(form for marker in markers.markers for form in marker.forms)


def token_spellings(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens that are one of the words in any case, with anything but letters around it: ".Wait", " HMM,", "(but".

    NoWait takes every token of the vocabulary that holds a keyword, and leaves out by hand those in which it is part of another
    word ("Ohio"); this is that list without a hand.
    """
    wanted = {word.lower().strip() for word in words}
    texts = token_texts(tokenizer)
    return tuple((token,) for token, text in enumerate(texts) if _AROUND.sub("", text).lower() in wanted)


_AROUND = re.compile(r"\A[\W\d_]+|[\W\d_]+\Z")


def one_token_forms(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The forms of the words that are one token; ValueError for a word that has none."""
    found: list[tuple[int, ...]] = []
    for word in words:
        single = [form for form in token_forms(tokenizer, [word]) if len(form) == 1]
        if not single:
            raise ValueError(
                f"{word!r} is several tokens under this tokenizer, and a thought ends before a whole one: name another word with "
                "--exit-words"
            )
        found += single
    return tuple(found)


def step_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens whose own text ends a sentence or a line, for rules that may not wait for the next one: "3." is among them."""
    texts = token_texts(tokenizer)
    return tuple(token for token, text in enumerate(texts) if token_class(text) & (ANY_STOP | SENTENCE | LINE))


def held_by_prompt(tokenizer: Any, render: Callable[[str], RenderedPrompt] | None) -> int:
    """Tokens of the thought that a prompt holds already; 0 where the model opens it."""
    ids = list((render or (lambda question: render_prompt(tokenizer, question)))("?").token_ids)
    tags = token_tags(tokenizer)
    if tags is None:
        return 0
    inside, start = open_thought(torch.tensor([ids]), tags)
    return len(ids) - int(start[0]) if bool(inside[0]) else 0
