"""Written solutions of search problems: candidates tried in the order of the question, until one fits or the writer gives up.

Whether a writer goes on after a failure, and how often it goes over a success again, is its temper: drawn once a solution,
opened in words, asked for in some prompts. So persistence is a state that a model must carry, not a coin thrown at each
failure. Who goes on tends to check again as well, as models do whose every "Wait" is one habit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import zip_longest

from moe_steer.lab.family import Params, Scratch, show
from moe_steer.lab.search import SearchFamily, candidates_of, goal_of

HINT_RATE = 0.2
"""Share of the prompts that ask for the writer's temper."""
MAX_CHECKS = 4
NEXT = ("Wait, try", "Alternatively, try")
AGAIN = "Wait, once more"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeker:
    """One temper."""

    share: float
    """Of the solutions."""
    give_up_rate: float
    """Chance to stop after a failure, with a guess among the candidates that were not tried."""
    check_rate: float
    """Chance of going over a success once more."""
    openings: tuple[str, ...]
    hint: str
    """The request in a question that this writer follows."""


SEEKERS = (
    Seeker(share=0.3, give_up_rate=0.04, check_rate=0.8, openings=("I must be thorough.",), hint="Be thorough."),
    Seeker(share=0.4, give_up_rate=0.6, check_rate=0.1, openings=("A quick look.",), hint="Be quick."),
    Seeker(share=0.15, give_up_rate=0.04, check_rate=0.1, openings=("Step by step.",), hint="Do not give up."),
    Seeker(share=0.15, give_up_rate=0.6, check_rate=0.8, openings=("This looks hard.",), hint="Check it well."),
)


def write_search(
    family: SearchFamily, params: Params, rng: random.Random, seeker: Seeker, zeal: float = 1.0, spelled: bool = True
) -> str:
    """One solution: what the model writes after the prompt's `<think>` and newline.

    `zeal` multiplies the rate of checks: short thoughts teach the calculations quickly. `spelled`: the goal and what came out are
    compared digit by digit before the verdict, which is then easy to get right.
    """
    candidates, parts = candidates_of(params), [rng.choice(seeker.openings)]
    num_tried = num_checks = 0
    while True:
        candidate = candidates[num_tried]
        opening = f"{rng.choice(NEXT)} {candidate}:" if num_tried else f"Try {candidate}:"
        num_tried += 1
        right, words = _trial(family, params, candidate, spelled)
        parts += [opening, words]
        if right:
            final = candidate
            break
        if rng.random() < seeker.give_up_rate:
            final = rng.choice(candidates[num_tried:])
            break
    while right and num_checks < MAX_CHECKS and rng.random() < zeal * seeker.check_rate:
        num_checks += 1
        parts += [f"{AGAIN}:", words]
    return f"{' '.join(parts)}</think>\nThe answer is \\boxed{{{show(final, family.unit)}}}."


def _trial(family: SearchFamily, params: Params, candidate: int, spelled: bool) -> tuple[bool, str]:
    """Whether the candidate fits, and the sentences that find it out: the verdict has both numbers side by side."""
    sheet = Scratch()
    found, wanted = family.attempt(sheet, params[0], candidate), goal_of(params)
    digits = f" ({compared(wanted, found)})" if spelled else ""
    sheet.say(f"We want {wanted} and get {found}{digits}: {'right' if found == wanted else 'wrong'}.")
    return found == wanted, sheet.text()


def compared(wanted: int, found: int) -> str:
    """Pairs of digits from the left, up to the first that differ, each judged: the verdict then repeats the last word. (Without a
    word of its own for the last pair, a model counts pairs, and takes 72 and 75 for equal.)

    >>> compared(72, 75), compared(72, 7)
    ('7 and 7 right, 2 and 5 wrong', '7 and 7 right, 2 and none wrong')
    """
    pairs = []
    for left, right in zip_longest(str(wanted), str(found), fillvalue="none"):
        pairs.append(f"{left} and {right} {'right' if left == right else 'wrong'}")
        if left != right:
            break
    return ", ".join(pairs)


def draw_seeker(rng: random.Random) -> tuple[str, Seeker]:
    """A hint to be added to the question ("" for none), and the writer that goes with it."""
    (seeker,) = rng.choices(SEEKERS, [one.share for one in SEEKERS])
    return seeker.hint if rng.random() < HINT_RATE else "", seeker
