"""The arms of an evaluation as words: ``baseline``, ``plan:plan.json``, ``tip:3,600``, ``soft:64``, ``plan:plan.json+budget:64``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.core.options import BASELINE
from reasoning_evals.decoding import NOWAIT_WORDS
from reasoning_evals.prompts import THINKING_PROMPT

REMINDER = "\nI should come to the answer now.\n"
TRIAL = "\n**Final Answer**\n\\boxed{"
"""What DEER (arXiv 2504.15895, the authors' release) writes to induce an answer."""
HINT = "Think for about {budget} tokens, then answer."

RULES = {
    BASELINE: "baseline, the model as it is",
    "plan": "plan:FILE, a steering plan",
    "preset": "preset:NAME, published experts",
    "prompt-before": "prompt-before, the thinking prompt before the tag that opens the thought",
    "prompt-after": "prompt-after, the thinking prompt after that tag",
    "no-thinking": "no-thinking, a thought that says it is finished",
    "thinking-off": "thinking-off, by the chat template's own switch",
    "effort": "effort:WORD, the model's own word for how hard to think",
    "hint": "hint:N, the user's turn asks for about N tokens of thought",
    "tip": "tip or tip:ALPHA,BETA, the penalty on switch words",
    "tip-close": "tip-close or tip-close:ALPHA,BETA, the same penalty on the closing tag",
    "nowait": "nowait, the ban of NoWait's words",
    "budget": "budget:N, the closing tag after N tokens of thought (those that the prompt writes, a line break, counted)",
    "soft": "soft:N or soft:N,RAMP,GRACE,PEAK, a budget with a ramp on the closing tag before it and a grace behind it",
    "remind": "remind:N, a reminder in the thought after N of its tokens",
    "continue": "continue:N, a word in place of the closing tag before N tokens of thought",
    "exit": "exit:FILE, the thought ends where a calibrated probe is sure",
    "deer": "deer or deer:THRESHOLD,TRIALS, the thought ends where a trial answer is sure",
}
"""What an arm can be made of."""
_PROMPTS = ("prompt-before", "prompt-after", "no-thinking", "thinking-off", "effort", "hint")
_GROUPS = {
    **{"plan": "plan", "preset": "plan", "soft": "budget"},
    **dict.fromkeys(_PROMPTS, "prompt"),
}
_NAMED = ("plan", "preset", "effort", "exit")


class _Numbers(NamedTuple):
    """The numbers of a rule: how many there may be, which of them are whole, which may be 0, and the largest of the first."""

    least: int = 0
    most: int = 0
    whole: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    largest: float = math.inf


_NUMBERS = {
    "tip": _Numbers(0, 2, whole=(1,)),
    "tip-close": _Numbers(0, 2, whole=(1,)),
    "budget": _Numbers(1, 1, whole=(0,), zero=(0,)),
    "soft": _Numbers(1, 4, whole=(0, 1, 2), zero=(1, 2, 3)),
    "hint": _Numbers(1, 1, whole=(0,)),
    "remind": _Numbers(1, 1, whole=(0,)),
    "continue": _Numbers(1, 1, whole=(0,)),
    "deer": _Numbers(0, 2, whole=(1,), largest=1.0),
}


class Rule(NamedTuple):
    """One word of an arm, checked."""

    kind: str
    text: str = ""
    """File of a plan or a probe, name of a preset, word of an effort."""
    numbers: tuple[float, ...] = ()


class Words(NamedTuple):
    """What the rules act on, as text, by the names of the options that say it; token ids are looked up in the tokenizer."""

    switch_words: Sequence[str] = ("Alternatively",)
    ban_words: Sequence[str] = NOWAIT_WORDS
    thinking_prompt: str = THINKING_PROMPT
    go_on_word: str = "Wait"
    budget_hint: str = HINT
    reminder: str = REMINDER
    exit_words: Sequence[str] = ("Wait",)
    trial_prompt: str = TRIAL


USUAL_WORDS = Words()


def parse_arm(word: str) -> tuple[Rule, ...]:
    """``tip:3,600+budget:64`` -> its rules; ValueError in one line says what is wrong with the word."""
    rules = tuple(_rule(part, word) for part in word.split("+"))
    groups = [_GROUPS.get(rule.kind, rule.kind) for rule in rules]
    if len(set(groups)) < len(groups):
        raise ValueError(
            f"the arm {word!r} has two rules of the same kind: give one plan, one prompt, one budget, one of each rule"
        )
    lengths = {_GROUPS.get(rule.kind, rule.kind): rule.numbers[0] for rule in rules if rule.kind in _LENGTHS}
    if "budget" in lengths and lengths["budget"] <= lengths.get("continue", -1):
        raise ValueError(
            f"the arm {word!r} ends its thought before it may end: give a budget above the length to go on to"
        )
    if "budget" in lengths and lengths["budget"] <= lengths.get("remind", -1):
        raise ValueError(
            f"the arm {word!r} reminds of a budget that is spent: remind after fewer tokens than the budget"
        )
    if len(rules) > 1 and "exit" in groups:
        raise ValueError(
            f"the arm {word!r}: the mis-exit rate of exit:FILE was stated for the model as it is, and another rule beside it would void it: "
            "give it an arm of its own"
        )
    if len(rules) > 1 and BASELINE in groups:
        raise ValueError(f"the arm {word!r}: {BASELINE} is the model without any rule; leave it out")
    return rules


_LENGTHS = ("budget", "soft", "continue", "remind")


def check_rule(word: str, instead: str) -> None:
    """ValueError when a word is wrong, or names a plan, which has a place of its own, ``instead``."""
    if any(_GROUPS.get(rule.kind) == "plan" for rule in parse_arm(word)):
        raise ValueError(f"the arm {word!r} names a plan: give that as {instead}")


def arm_name(rules: Iterable[Rule]) -> str:
    """How the arm is called in the run and in the report; a plan goes by the name of its file, without folder and ending."""

    def one(rule: Rule) -> str:
        text = (
            Path(rule.text).stem
            if rule.kind in ("plan", "exit")
            else rule.text or ",".join(f"{n:g}" for n in rule.numbers)
        )
        return f"{rule.kind}:{text}" if text else rule.kind

    return "+".join(one(rule) for rule in rules)


def check_arms(words: Sequence[str]) -> None:
    """ValueError when a word is wrong, two arms would have one name, or there are fewer than two."""
    names = [arm_name(parse_arm(word)) for word in words]
    if len(names) < 2:
        raise ValueError(f"arms are {list(words)}: give at least two, a comparison needs them")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two arms are named {twice[0]!r}: give each arm once, and plan files of different names")


def _rule(part: str, word: str) -> Rule:
    kind, colon, value = part.partition(":")
    if kind not in RULES:
        forms = ", ".join(text.replace(",", " ").split()[0] for text in RULES.values())
        raise ValueError(
            f"the arm {word!r} has the unknown rule {kind!r}: choose one of {forms} (docs/how-to/levers.md says what each does)"
        )
    if kind in _NAMED:
        if not value:
            raise ValueError(f"the arm {word!r} names no {kind}: write {RULES[kind]}")
        return Rule(kind, value)
    try:
        numbers = tuple(float(number) for number in value.split(",")) if colon else ()
    except ValueError:
        numbers = (float("nan"),)
    takes = _NUMBERS.get(kind, _Numbers())
    if not (
        takes.least <= len(numbers) <= takes.most
        and all(number > 0 or (number == 0 and place in takes.zero) for place, number in enumerate(numbers))
        and all(numbers[place].is_integer() for place in takes.whole if place < len(numbers))
        and all(number <= takes.largest for number in numbers[:1])
        and math.inf not in numbers
    ):
        raise ValueError(
            f"the arm {word!r} has {part!r} in it: write {kind + ', ' if not takes.most else ''}{RULES[kind]}"
        )
    return Rule(kind, "", numbers)
