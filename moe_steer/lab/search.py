"""Families of problems that are solved by trying: which of six candidates fits? A trial is one short calculation, and thinking
on after a failure pays; no other lab problem has that.

Numbers of a problem: (given, goal, then the candidates in the order in which the question lists them).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from moe_steer.lab.family import Family, Params, Scratch

NUM_CANDIDATES = 6
TWO_DIGITS = range(11, 60)
SMALL = range(2, 13)
"""Candidates that are squared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchFamily(Family):
    """A family whose problems list candidates of which exactly one fits."""

    attempt: Callable[[Scratch, int, int], int]
    """(sheet, given, candidate) -> what the candidate comes to, worked out on the sheet; right if it equals the goal."""


def goal_of(params: Params) -> int:
    """What the right candidate comes to."""
    return params[1]


def candidates_of(params: Params) -> Params:
    """In the order of the question."""
    return params[2:]


def _family(
    name: str,
    value: Callable[[int, int], int],
    attempt: Callable[[Scratch, int, int], int],
    wordings: tuple[str, ...],
    given: range = range(0, 1),
    pool: range = TWO_DIGITS,
    domain: str = "maths",
    unit: str | None = None,
) -> SearchFamily:
    """``value``: (given, candidate) -> what it comes to, by a formula. ``wordings`` name {given}, {goal} and {candidates}."""

    def draw(rng: random.Random) -> Params:
        added, candidates = rng.choice(given), rng.sample(pool, NUM_CANDIDATES)
        return (added, value(added, rng.choice(candidates)), *candidates)

    def answer(params: Params) -> int:
        (right,) = (number for number in candidates_of(params) if value(params[0], number) == goal_of(params))
        return right

    def words(params: Params) -> list[str]:
        *first, last = map(str, candidates_of(params))
        listed = f"{', '.join(first)} or {last}"
        return [text.format(given=params[0], goal=goal_of(params), candidates=listed) for text in wordings]

    def solve(sheet: Scratch, params: Params) -> int:
        tried = (number for number in candidates_of(params) if attempt(sheet, params[0], number) == goal_of(params))
        return next(tried)

    return SearchFamily(
        name=name,
        domain=domain,
        draw=draw,
        answer=answer,
        wordings=words,
        solve=solve,
        checks=(),
        unit=unit,
        attempt=attempt,
    )


SUM = _family(
    name="which_summand",
    value=lambda given, number: number + given,
    attempt=lambda sheet, given, number: sheet.add(number, given),
    given=range(11, 40),
    wordings=(
        "Which number gives {goal} when {given} is added: {candidates}?",
        "Find the number that makes {goal} together with {given}: {candidates}?",
    ),
)

DIFFERENCE = _family(
    name="which_minuend",
    value=lambda given, number: number - given,
    attempt=lambda sheet, given, number: sheet.subtract(number, given),
    given=range(11, 30),
    pool=range(30, 80),
    wordings=(
        "Which number gives {goal} when {given} is taken away: {candidates}?",
        "Find the number that is {goal} after {given} is lost: {candidates}?",
    ),
)

DIGIT_SUM = _family(
    name="which_with_digits",
    value=lambda _, number: number + number // 10 + number % 10,
    attempt=lambda sheet, _, number: sheet.add(sheet.add(number, number // 10), number % 10),
    wordings=(
        "Which number gives {goal} when both of its digits are added: {candidates}?",
        "Find the number that makes {goal} with its own two digits: {candidates}?",
    ),
)

SQUARE = _family(
    name="which_square",
    value=lambda given, number: number**2 + given,
    attempt=lambda sheet, given, number: sheet.add(sheet.multiply(number, number), given),
    given=range(11, 50),
    pool=SMALL,
    wordings=(
        "Which number gives {goal} when it is squared and {given} is added: {candidates}?",
        "Find the number whose square and {given} make {goal}: {candidates}?",
    ),
)

RESISTOR = _family(
    name="which_resistor",
    domain="physics",
    value=lambda given, number: number + given,
    attempt=lambda sheet, given, number: sheet.add(number, given),
    given=range(11, 40),
    unit="ohm",
    wordings=(
        "Which resistor makes {goal} ohm in series with {given} ohm: {candidates} ohm?",
        "A circuit of {given} ohm and one more in series has {goal} ohm. Which one: {candidates} ohm?",
    ),
)

COOLING = _family(
    name="which_temperature",
    domain="physics",
    value=lambda given, number: number - given,
    attempt=lambda sheet, given, number: sheet.subtract(number, given),
    given=range(11, 30),
    pool=range(30, 80),
    unit="K",
    wordings=(
        "A gas cools by {given} K to {goal} K. Where did it start: {candidates} K?",
        "Which temperature falls to {goal} K when {given} K are lost: {candidates} K?",
    ),
)

FORCE = _family(
    name="which_mass",
    domain="physics",
    value=lambda given, number: number * given,
    attempt=lambda sheet, given, number: sheet.multiply(number, given),
    given=range(2, 6),
    pool=range(11, 50),
    unit="kg",
    wordings=(
        "Which mass needs {goal} N for {given} m/s^2: {candidates} kg?",
        "A force of {goal} N speeds a box up by {given} m/s^2. Which mass has it: {candidates} kg?",
    ),
)

KINETIC = _family(
    name="which_speed",
    domain="physics",
    value=lambda given, number: number**2 + given,
    attempt=lambda sheet, given, number: sheet.add(sheet.multiply(number, number), given),
    given=range(11, 50),
    pool=SMALL,
    unit="m/s",
    wordings=(
        "A motor gives {goal} J to a 2 kg cart, and {given} J of them become heat. Which speed has the cart: {candidates} m/s?",
        "A 2 kg cart rolls, and friction took {given} J of the {goal} J put in. How fast is it: {candidates} m/s?",
    ),
)

FAMILIES = (SUM, DIFFERENCE, DIGIT_SUM, SQUARE, RESISTOR, COOLING, FORCE, KINETIC)
