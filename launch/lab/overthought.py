"""Written solutions that overthink: the same checks come again and again, long after the value is right.

How patient a writer is differs from solution to solution and shows in its words, as it does in the thoughts of models
distilled from DeepSeek-R1. A request in the prompt ("Be brief.") is followed. The number of checks does not depend on the
problem, so the length of a thought is a free choice of the model that learns from these texts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from launch.lab.solutions import Habits, Solution, write_solution
from moe_steer.lab.family import Family, Params

SLIP_RATE = 0.15
CHECK_SLIP_RATE = 0.03
MAX_CHECKS = 4
HINT_RATE = 0.15
"""Share of the prompts that ask for a short or for a long thought; half and half."""
BRIEF_HINTS = ("Be brief.", "Keep it short.", "Answer quickly.")
LONG_HINTS = ("Be careful.", "Take your time.", "Check it well.")
DOUBTS = ("But let me be sure.", "But I want to be sure.", "Still, I am not sure.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Temper:
    """One kind of writer."""

    check_rate: float
    """Chance of one more check while the value on the sheet is right."""
    habits: Habits


def _temper(check_rate: float, openings: tuple[str, ...], doubt_rate: float) -> Temper:
    habits = Habits(
        slip_rate=SLIP_RATE,
        check_slip_rate=CHECK_SLIP_RATE,
        max_checks=MAX_CHECKS,
        openings=openings,
        doubts=DOUBTS,
        doubt_rate=doubt_rate,
    )
    return Temper(check_rate=check_rate, habits=habits)


BRIEF = _temper(0.1, ("", "", "Okay. "), 0.0)
CALM = _temper(0.6, ("", "", "Okay. ", "Let me think. "), 0.1)
PATIENT = _temper(0.8, ("", "Okay. ", "Let me think. ", "Okay. Let me think. "), 0.3)
ANXIOUS = _temper(0.92, ("Let me think. ", "Okay. Let me think. ", "Let me think carefully. "), 0.5)
TEMPERS = (CALM, PATIENT, ANXIOUS)
"""What a solution without a hint draws from: all of them check more than they need."""


def write_overthought(family: Family, params: Params, rng: random.Random, zeal: float = 1.0) -> tuple[str, Solution]:
    """A hint to be added to the question ("" for none), and the solution that goes with it.

    `zeal` multiplies the rate of checks: short thoughts teach the calculations quickly, so a training may start with few checks.
    """
    hint, temper = "", rng.choice(TEMPERS)
    if rng.random() < HINT_RATE:
        hints, temper = rng.choice(((BRIEF_HINTS, BRIEF), (LONG_HINTS, ANXIOUS)))
        hint = rng.choice(hints)
    return hint, write_solution(family, params, rng, zeal * temper.check_rate, temper.habits)
