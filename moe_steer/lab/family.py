"""What a family of problems is (how to draw one, word it, solve it and check it), and the scratch paper on which it is solved."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LET_ME_CHECK = "Wait, let me check."
HMM = "Hmm, is that right?"
ALTERNATIVELY = "Alternatively, another way."
OTHER_OPERATION = {"*": "+", "+": "-", "-": "+"}

Params = tuple[int, ...]
Value = int | str  # a fraction is the text 3/4
CheckResult = tuple[Value, Value]


class NotWholeError(ArithmeticError):
    """A division had a remainder; the caller then tries another slip."""


class Scratch:
    """Writes calculations as short sentences and returns their results, so that a slip propagates as it would on paper.

    `slip_at` is the index of the calculation that goes wrong (None: all are right). Numbers are whole and not negative.
    """

    def __init__(self, rng: random.Random | None = None, slip_at: int | None = None) -> None:
        self.rng = rng or random.Random(0)
        self.slip_at = slip_at
        self.num_calculations = 0
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """Add a sentence, written with its full stop."""
        self.sentences.append(sentence)

    def add(self, left: int, right: int) -> int:
        return self._calculate(left, "+", right)

    def subtract(self, left: int, right: int) -> int:
        return self._calculate(left, "-", right)

    def multiply(self, left: int, right: int) -> int:
        return self._calculate(left, "*", right)

    def divide(self, left: int, right: int) -> int:
        return self._calculate(left, "/", right)

    def text(self) -> str:
        return " ".join(self.sentences)

    def _calculate(self, left: int, operation: str, right: int) -> int:
        slips = self.num_calculations == self.slip_at
        self.num_calculations += 1
        if slips and operation in OTHER_OPERATION and self.rng.random() < 0.25:
            swapped = OTHER_OPERATION[operation]
            if evaluate(left, swapped, right) != evaluate(left, operation, right) and (swapped != "-" or left >= right):
                operation, slips = swapped, False
        right_result = evaluate(left, operation, right)
        result = slipped(right_result, self.rng) if slips else right_result
        middle = "" if slips else long_multiplication(left, operation, right)
        self.say(f"{left} {operation} {right} = {middle}{result}.")
        return result


def evaluate(left: int, operation: str, right: int) -> int:
    """The right result of one calculation; NotWholeError if it is fractional or negative."""
    if operation == "+":
        return left + right
    if operation == "*":
        return left * right
    if operation == "-":
        if left < right:
            raise NotWholeError(f"{left} - {right} is negative")
        return left - right
    if right == 0 or left % right:
        raise NotWholeError(f"{left} / {right} is not whole")
    return left // right


def slipped(result: int, rng: random.Random) -> int:
    """A wrong result of the kinds people write: off by one or two, a lost or extra ten, two digits swapped."""
    candidates = [result + 1, result + 2, result + 10]
    candidates += [value for value in (result - 1, result - 2, result - 10) if value > 0]
    tens, ones = divmod(result, 10)
    if 0 < tens < 10 and tens != ones and ones > 0:
        candidates.append(10 * ones + tens)
    return rng.choice(candidates)


def long_multiplication(left: int, operation: str, right: int) -> str:
    """The middle of `23 * 4 = 80 + 12 = 92`, for a number with two or more digits other than 0 times one digit."""
    if operation != "*":
        return ""
    large, small = max(left, right), min(left, right)
    digits = str(large)
    parts = [int(digit) * 10**place * small for place, digit in enumerate(reversed(digits)) if digit != "0"]
    if not 2 <= small <= 9 or len(parts) < 2:
        return ""
    return " + ".join(str(part) for part in reversed(parts)) + " = "


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One way to check a candidate answer: writes its work on the sheet and returns (result, expected)."""

    opening: str
    """How the thought introduces the check, "Alternatively, ..." for a second method."""
    run: Callable[[Scratch, Params, Value], CheckResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family of problems that differ only in their numbers and wording."""

    name: str
    domain: str = "maths"
    """maths or physics."""
    draw: Callable[[random.Random], Params]
    """Draws the numbers of one problem, in a canonical order (equal problems have equal tuples)."""
    answer: Callable[[Params], Value]
    """The target, by a formula that does not use the written solution."""
    wordings: Callable[[Params], list[str]]
    """The same question in several plain-English forms."""
    solve: Callable[[Scratch, Params], Value]
    """Computes the answer on the sheet."""
    checks: tuple[Check, ...]
    unit: str | None = None
    """Of a quantity; None for pure numbers."""
    pure: str = "integer"
    """What kind of pure number: integer, number or expression."""

    @property
    def answer_type(self) -> str:
        """As graders name it."""
        return self.pure if self.unit is None else "quantity"


def show(value: Value, unit: str | None = None) -> str:
    """`3/4`, `17` or `17 m/s`."""
    return f"{value}" if unit is None else f"{value} {unit}"


def second_method(work: Callable[[Scratch, Params], Value]) -> Callable[[Scratch, Params, Value], CheckResult]:
    """A check that computes the answer another way and compares it with the candidate."""

    def run(sheet: Scratch, params: Params, candidate: Value) -> CheckResult:
        return work(sheet, params), candidate

    return run


def another_way(work: Callable[[Scratch, Params], Value]) -> tuple[Check, ...]:
    """The one check by a second method."""
    return (Check(opening=ALTERNATIVELY, run=second_method(work)),)


def doubted(run: Callable[[Scratch, Params, Value], CheckResult]) -> tuple[Check, ...]:
    """The same check, as two ways of doubting introduce it."""
    return tuple(Check(opening=opening, run=run) for opening in (LET_ME_CHECK, HMM))
