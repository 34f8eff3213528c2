"""Families of maths problems about whole numbers and fractions: remainders, divisors, percentages, averages."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from moe_steer.lab.family import (
    LET_ME_CHECK,
    Check,
    Family,
    NotWholeError,
    Params,
    Scratch,
    Value,
    another_way,
    doubted,
)


def _modular_solve(sheet: Scratch, params: Params) -> Value:
    left, right, modulus = params
    total = sheet.add(left, right)
    fits = total // modulus
    sheet.say(f"{modulus} goes {fits} times.")
    return sheet.subtract(total, sheet.multiply(modulus, fits))


def _modular_alternative(sheet: Scratch, params: Params) -> Value:
    left, right, modulus = params
    sheet.say(f"{left} leaves {left % modulus} and {right} leaves {right % modulus}.")
    rest = sheet.add(left % modulus, right % modulus)
    return sheet.subtract(rest, modulus) if rest >= modulus else rest


MODULAR = Family(
    name="modular_arithmetic",
    draw=lambda rng: (*sorted((rng.randint(10, 40), rng.randint(10, 40))), rng.randint(3, 9)),
    answer=lambda p: (p[0] + p[1]) % p[2],
    wordings=lambda p: [
        f"What is the remainder of {p[0]} + {p[1]} divided by {p[2]}?",
        f"Compute ({p[0]} + {p[1]}) mod {p[2]}.",
        f"{p[0]} red and {p[1]} blue cards are dealt evenly to {p[2]} players. How many cards are left over?",
    ],
    solve=_modular_solve,
    checks=another_way(_modular_alternative),
)


def _draw_ratio(rng: random.Random) -> Params:
    while True:
        top, bottom = rng.randint(1, 11), rng.randint(2, 12)
        if top < bottom and math.gcd(top, bottom) == 1:
            return top, bottom, rng.randint(2, 9)


def _simplify_solve(sheet: Scratch, params: Params) -> Value:
    top, bottom, common = params
    sheet.say(f"Both can be divided by {common}.")
    return f"{sheet.divide(top * common, common)}/{sheet.divide(bottom * common, common)}"


def _simplify_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    top, bottom, common = params
    found_top, found_bottom = (int(part) for part in str(value).split("/"))
    big_top, big_bottom = sheet.multiply(found_top, common), sheet.multiply(found_bottom, common)
    return f"{big_top}/{big_bottom}", f"{top * common}/{bottom * common}"


FRACTION_SIMPLIFY = Family(
    name="fraction_simplify",
    pure="expression",
    draw=_draw_ratio,
    answer=lambda p: str(Fraction(p[0], p[1])),
    wordings=lambda p: [
        f"Write {p[0] * p[2]}/{p[1] * p[2]} in lowest terms.",
        f"Simplify the fraction {p[0] * p[2]}/{p[1] * p[2]}.",
        f"{p[0] * p[2]} of {p[1] * p[2]} apples are red. What fraction is that in lowest terms?",
    ],
    solve=_simplify_solve,
    checks=doubted(_simplify_check),
)


def _draw_fractions(rng: random.Random) -> Params:
    while True:
        first, second = sorted((rng.randint(2, 10), rng.randint(2, 10)))
        top_first, top_second = rng.randint(1, first - 1), rng.randint(1, second - 1)
        coprime = math.gcd(top_first, first) == 1 and math.gcd(top_second, second) == 1
        if first != second and coprime and math.gcd(first, second) == 1:
            return top_first, first, top_second, second


def _fractions_solve(sheet: Scratch, params: Params) -> Value:
    top_first, first, top_second, second = params
    bottom = sheet.multiply(first, second)
    left, right = sheet.multiply(top_first, second), sheet.multiply(top_second, first)
    return f"{sheet.add(left, right)}/{bottom}"


def _fractions_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    """Subtracts the first fraction again, over the common denominator."""
    top_first, first, top_second, second = params
    top, bottom = (int(part) for part in str(value).split("/"))
    left = sheet.multiply(top_first, second)
    rest = sheet.subtract(top, left) if top >= left else 0
    return f"{rest}/{bottom}", f"{sheet.multiply(top_second, first)}/{sheet.multiply(first, second)}"


FRACTION_ADD = Family(
    name="fraction_add",
    pure="expression",
    draw=_draw_fractions,
    answer=lambda p: str(Fraction(p[0], p[1]) + Fraction(p[2], p[3])),
    wordings=lambda p: [
        f"What is {p[0]}/{p[1]} + {p[2]}/{p[3]}? Give a fraction.",
        f"Add the fractions {p[0]}/{p[1]} and {p[2]}/{p[3]}.",
        f"Tim walks {p[0]}/{p[1]} km and then {p[2]}/{p[3]} km. How many km is that as a fraction?",
    ],
    solve=_fractions_solve,
    checks=(Check(opening=LET_ME_CHECK, run=_fractions_check),),
)


def _percent_solve(sheet: Scratch, params: Params) -> Value:
    percent, number = params
    tenth = sheet.divide(number, 10)
    value = sheet.multiply(tenth, percent // 10) if percent >= 10 else 0
    if percent % 10 == 0:
        return value
    half = sheet.divide(tenth, 2)
    return sheet.add(value, half) if percent >= 10 else half


def _percent_alternative(sheet: Scratch, params: Params) -> Value:
    percent, number = params
    twentieth = sheet.divide(number, 20)
    return sheet.multiply(twentieth, percent // 5)


PERCENT = Family(
    name="percent",
    pure="number",
    draw=lambda rng: (5 * rng.randint(1, 19), 20 * rng.randint(2, 40)),
    answer=lambda p: p[0] * p[1] // 100,
    wordings=lambda p: [
        f"What is {p[0]}% of {p[1]}?",
        f"{p[0]} percent of {p[1]} people ride a bike. How many people is that?",
        f"A coat costs {p[1]} dollars. The price drops by {p[0]}%. How many dollars does it drop?",
    ],
    solve=_percent_solve,
    checks=another_way(_percent_alternative),
)


def _draw_gcd(rng: random.Random) -> Params:
    while True:
        common, small, large = rng.randint(2, 12), rng.randint(2, 9), rng.randint(3, 12)
        if small < large and math.gcd(small, large) == 1:
            return common * small, common * large


def _gcd_solve(sheet: Scratch, params: Params) -> Value:
    small, large = params
    for _ in range(6):
        fits = large // small
        if fits == 0:
            break
        taken = small if fits == 1 else sheet.multiply(small, fits)
        small, large = sheet.subtract(large, taken), small
        if small == 0:
            return large
    raise NotWholeError("a slip made the subtractions endless")


def _gcd_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    small, large = params
    divisor = int(value)
    if divisor == 0:
        return "0 and 0", f"{small} and {large}"
    products = (sheet.multiply(divisor, small // divisor), sheet.multiply(divisor, large // divisor))
    return f"{products[0]} and {products[1]}", f"{small} and {large}"


GCD = Family(
    name="gcd",
    draw=_draw_gcd,
    answer=lambda p: math.gcd(*p),
    wordings=lambda p: [
        f"What is the greatest common divisor of {p[0]} and {p[1]}?",
        f"Find gcd({p[0]}, {p[1]}).",
        f"{p[0]} apples and {p[1]} pears are packed into equal bags with none left. What is the largest number of bags?",
    ],
    solve=_gcd_solve,
    checks=doubted(_gcd_check),
)


def _draw_average(rng: random.Random) -> Params:
    while True:
        numbers = [rng.randint(4, 40) for _ in range(3)]
        if sum(numbers) % 3 == 0 and len(set(numbers)) == 3:
            return tuple(sorted(numbers))


def _average_solve(sheet: Scratch, params: Params) -> Value:
    return sheet.divide(sheet.add(sheet.add(params[0], params[1]), params[2]), 3)


def _average_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    """Three times the average, minus the largest number, must be the sum of the other two."""
    whole = sheet.multiply(3, int(value))
    rest = sheet.subtract(whole, params[2]) if whole >= params[2] else 0
    return rest, sheet.add(params[0], params[1])


AVERAGE = Family(
    name="average",
    pure="number",
    draw=_draw_average,
    answer=lambda p: sum(p) // 3,
    wordings=lambda p: [
        f"What is the average of {p[0]}, {p[1]} and {p[2]}?",
        f"Find the mean of {p[0]}, {p[1]} and {p[2]}.",
        f"Three friends have {p[0]}, {p[1]} and {p[2]} dollars and share evenly. How many dollars does each get?",
    ],
    solve=_average_solve,
    checks=doubted(_average_check),
)

FAMILIES = (MODULAR, FRACTION_SIMPLIFY, FRACTION_ADD, PERCENT, GCD, AVERAGE)
