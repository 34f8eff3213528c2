"""Written solutions to learn from.

Of problems that are solved by a method: a first attempt that may slip, a random number of checks, corrections, the answer. The number of checks is
drawn, not implied by the problem, so how long to think stays a free choice of the model that learns from these texts. Some overthink: the same
checks come again and again, long after the value is right. How patient such a writer is differs from solution to solution and shows in its words,
as it does in the thoughts of models distilled from DeepSeek-R1. A request in the prompt ("Be brief.") is followed.

Of search problems: candidates tried in the order of the question, until one fits or the writer gives up. Whether a writer goes on after a failure,
and how often it goes over a success again, is its temper: drawn once a solution, opened in words, asked for in some prompts. So persistence is a
state that a model must carry, not a coin thrown at each failure. Who goes on tends to check again as well, as models do whose every "Wait" is
one habit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import zip_longest

from moe_steer.lab.family import Check, Family, NotWholeError, Params, Scratch, Value, second_method, show
from moe_steer.lab.search import SearchFamily, candidates_of, goal_of

CHECK_RATE = 0.5
MAX_CHECKS = 5
REDO_OPENINGS = ("Wait, let me go over it again.", "Hmm, once more.")
FITS = ("It fits.", "Yes, that is right.", "Good.")
FAILS = ("That is wrong.", "No, there is a mistake.")
REDO = "Let me redo it."
DOUBTER_SLIP_RATE = 0.15
DOUBTER_CHECK_SLIP_RATE = 0.03
MOST_CHECKS_OF_DOUBTERS = 4
HINT_RATE = 0.15
"""Share of the prompts that ask for a short or for a long thought; half and half."""
BRIEF_HINTS = ("Be brief.", "Keep it short.", "Answer quickly.")
LONG_HINTS = ("Be careful.", "Take your time.", "Check it well.")
DOUBTS = ("But let me be sure.", "But I want to be sure.", "Still, I am not sure.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """How a writer of solutions works."""

    slip_rate: float = 0.3
    """Chance that the first attempt holds a slip."""
    check_slip_rate: float = 0.04
    """Chance that a check of a right value slips."""
    max_checks: int = MAX_CHECKS
    openings: tuple[str, ...] = ("", "", "Let me think. ", "Okay. ")
    doubts: tuple[str, ...] = ()
    """Sentences that may follow a check that came out right."""
    doubt_rate: float = 0.0


CAREFUL = Habits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A thought and its answer, with what happened in it."""

    thought: str
    answer: str
    first_value: Value
    num_checks: int
    num_corrections: int

    def text(self) -> str:
        """What the model writes after the prompt's `<think>` and newline."""
        return f"{self.thought}</think>\n{self.answer}"


def write_solution(
    family: Family,
    params: Params,
    rng: random.Random,
    check_rate: float = CHECK_RATE,
    habits: Habits = CAREFUL,
) -> Solution:
    """One solution. A slipped first attempt is always found and corrected; right ones are checked 0 to `max_checks` times.

    `check_rate` is the chance of one more check while the value on the sheet is right.
    """
    target, unit = family.answer(params), family.unit
    sheet, value = _first_attempt(family, params, rng, habits.slip_rate)
    first_value = value
    parts = [rng.choice(habits.openings) + sheet.text(), f"So it is {show(value, unit)}."]
    num_checks = num_corrections = 0
    while value != target or (num_checks < habits.max_checks and rng.random() < check_rate):
        check = _choose_check(family, rng, sure=num_checks >= habits.max_checks - 1 and value != target)
        slip_rate = habits.check_slip_rate if value == target else 0.0
        work, found, wanted = _run_check(check, params, value, rng, slip_rate)
        num_checks += 1
        parts += [check.opening, work, f"We want {wanted} and get {found}."]
        if found == wanted:
            parts.append(rng.choice(FITS))
            if habits.doubts and rng.random() < habits.doubt_rate:
                parts.append(rng.choice(habits.doubts))
            continue
        num_corrections += 1
        redo = Scratch()
        value = family.solve(redo, params)
        parts += [rng.choice(FAILS), REDO, redo.text(), f"So it is {show(value, unit)}."]
    return Solution(
        thought=" ".join(part for part in parts if part),
        answer=f"The answer is \\boxed{{{show(value, unit)}}}.",
        first_value=first_value,
        num_checks=num_checks,
        num_corrections=num_corrections,
    )


def _first_attempt(family: Family, params: Params, rng: random.Random, slip_rate: float) -> tuple[Scratch, Value]:
    plain = Scratch()
    value = family.solve(plain, params)
    if plain.num_calculations == 0 or rng.random() >= slip_rate:
        return plain, value
    for _ in range(8):
        sheet = Scratch(rng, slip_at=rng.randrange(plain.num_calculations))
        try:
            return sheet, family.solve(sheet, params)
        except NotWholeError:
            continue
    return plain, value


def _choose_check(family: Family, rng: random.Random, sure: bool) -> Check:
    """A check of the family, or going over the first method again; the latter finds every slip."""
    if sure or rng.random() < 0.25:
        return Check(opening=rng.choice(REDO_OPENINGS), run=second_method(family.solve))
    return rng.choice(family.checks)


def _run_check(
    check: Check, params: Params, value: Value, rng: random.Random, slip_rate: float
) -> tuple[str, Value, Value]:
    """A check's sentences, what came out and what should; a check of a right value slips now and then."""
    if slip_rate and rng.random() < slip_rate:
        sheet = Scratch(rng, slip_at=0)
        try:
            found, wanted = check.run(sheet, params, value)
            return sheet.text(), found, wanted
        except NotWholeError:
            pass
    sheet = Scratch()
    found, wanted = check.run(sheet, params, value)
    return sheet.text(), found, wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Temper:
    """One kind of writer."""

    check_rate: float
    """Chance of one more check while the value on the sheet is right."""
    habits: Habits


def _temper(check_rate: float, openings: tuple[str, ...], doubt_rate: float) -> Temper:
    habits = Habits(
        slip_rate=DOUBTER_SLIP_RATE,
        check_slip_rate=DOUBTER_CHECK_SLIP_RATE,
        max_checks=MOST_CHECKS_OF_DOUBTERS,
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


SEEKER_HINT_RATE = 0.2
"""Share of the prompts that ask for the writer's temper."""
MAX_SECOND_LOOKS = 4
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
    while right and num_checks < MAX_SECOND_LOOKS and rng.random() < zeal * seeker.check_rate:
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
    return seeker.hint if rng.random() < SEEKER_HINT_RATE else "", seeker
