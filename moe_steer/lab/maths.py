"""Families of maths problems: chains, products, equations, sequences and plane figures."""

from __future__ import annotations

from moe_steer.lab.family import LET_ME_CHECK, Check, Family, Params, Scratch, Value, another_way, doubted


def _chain_alternative(sheet: Scratch, params: Params) -> Value:
    start, gained, times = params
    first = sheet.multiply(start, times)
    second = sheet.multiply(gained, times)
    return sheet.add(first, second)


def _chain_back(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    start, gained, times = params
    extra = sheet.multiply(gained, times)
    rest = sheet.subtract(int(value), extra) if int(value) >= extra else 0
    return rest, sheet.multiply(start, times)


TWO_STEP_CHAIN = Family(
    name="two_step_chain",
    draw=lambda rng: (rng.randint(3, 40), rng.randint(2, 40), rng.randint(2, 6)),
    answer=lambda p: (p[0] + p[1]) * p[2],
    wordings=lambda p: [
        f"Start with {p[0]}, add {p[1]} and multiply the sum by {p[2]}. What is the result?",
        f"Ann has {p[0]} coins and finds {p[1]} more. Then her coins become {p[2]} times as many. How many coins does she have?",
        f"Compute ({p[0]} + {p[1]}) * {p[2]}.",
        f"Each of {p[2]} boxes holds {p[0]} red and {p[1]} blue balls. How many balls are there in all?",
    ],
    solve=lambda sheet, p: sheet.multiply(sheet.add(p[0], p[1]), p[2]),
    checks=(*another_way(_chain_alternative), Check(opening=LET_ME_CHECK, run=_chain_back)),
)


def _product_alternative(sheet: Scratch, params: Params) -> Value:
    large, small = params
    up = large + 10 - large % 10
    sheet.say(f"{large} is {up} - {up - large}.")
    whole = sheet.multiply(up, small)
    extra = sheet.multiply(up - large, small)
    return sheet.subtract(whole, extra)


PRODUCT = Family(
    name="product",
    draw=lambda rng: (rng.randint(11, 99), rng.randint(3, 9)),
    answer=lambda p: p[0] * p[1],
    wordings=lambda p: [
        f"What is {p[0]} times {p[1]}?",
        f"Compute {p[0]} * {p[1]}.",
        f"A book has {p[0]} pages. How many pages do {p[1]} such books have?",
        f"Find the product of {p[0]} and {p[1]}.",
    ],
    solve=lambda sheet, p: sheet.multiply(p[0], p[1]),
    checks=another_way(_product_alternative),
)


def _equation_solve(sheet: Scratch, params: Params) -> Value:
    factor, root, shift = params
    sheet.say(f"{factor} * x + {shift} = {factor * root + shift}.")
    return sheet.divide(sheet.subtract(factor * root + shift, shift), factor)


def _equation_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    factor, root, shift = params
    return sheet.add(sheet.multiply(factor, int(value)), shift), factor * root + shift


LINEAR_EQUATION = Family(
    name="linear_equation",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(2, 15), rng.randint(1, 30)),
    answer=lambda p: p[1],
    wordings=lambda p: [
        f"Solve for x: {p[0]}x + {p[2]} = {p[0] * p[1] + p[2]}.",
        f"{p[0]} times a number plus {p[2]} gives {p[0] * p[1] + p[2]}. What is the number?",
        f"Find x if {p[0]} * x + {p[2]} = {p[0] * p[1] + p[2]}.",
        f"A taxi costs {p[2]} dollars plus {p[0]} dollars per km. A ride cost {p[0] * p[1] + p[2]} dollars. How many km was it?",
    ],
    solve=_equation_solve,
    checks=doubted(_equation_check),
)


def _sequence_solve(sheet: Scratch, params: Params) -> Value:
    first, difference, place = params
    return sheet.add(first, sheet.multiply(sheet.subtract(place, 1), difference))


def _sequence_alternative(sheet: Scratch, params: Params) -> Value:
    first, difference, place = params
    before = first - difference
    sheet.say(f"The term before the first is {before}.")
    return sheet.add(before, sheet.multiply(place, difference))


SEQUENCE = Family(
    name="sequence",
    draw=lambda rng: (lambda d: (rng.randint(d, d + 20), d, rng.randint(5, 20)))(rng.randint(2, 9)),
    answer=lambda p: p[0] + (p[2] - 1) * p[1],
    wordings=lambda p: [
        f"A sequence starts with {p[0]} and grows by {p[1]} each time. What is term number {p[2]}?",
        f"Find term {p[2]} of {p[0]}, {p[0] + p[1]}, {p[0] + 2 * p[1]}, ...",
        f"The first row has {p[0]} seats and each row has {p[1]} more than the row before. How many seats are in row {p[2]}?",
    ],
    solve=_sequence_solve,
    checks=another_way(_sequence_alternative),
)


def _squares_alternative(sheet: Scratch, params: Params) -> Value:
    large, small = params
    total = sheet.add(large, small)
    return sheet.multiply(total, sheet.subtract(large, small))


SQUARES = Family(
    name="difference_of_squares",
    draw=lambda rng: (lambda gap, small: (small + gap, small))(rng.randint(1, 9), rng.randint(2, 60)),
    answer=lambda p: p[0] ** 2 - p[1] ** 2,
    wordings=lambda p: [
        f"What is {p[0]}^2 - {p[1]}^2?",
        f"By how much is the square of {p[0]} larger than the square of {p[1]}?",
        f"A square of side {p[0]} has a square hole of side {p[1]}. What area is left?",
    ],
    solve=_squares_alternative,
    checks=another_way(
        lambda sheet, p: sheet.add(sheet.multiply(p[0], p[0] - p[1]), sheet.multiply(p[1], p[0] - p[1]))
    ),
)


def _change_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    count, price, paid = params
    return sheet.add(sheet.multiply(price, count), int(value)), paid


CHANGE = Family(
    name="change",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(11, 49), rng.choice((500, 600, 800))),
    answer=lambda p: p[2] - p[0] * p[1],
    wordings=lambda p: [
        f"{p[0]} pens cost {p[1]} cents each. You pay with {p[2]} cents. How many cents do you get back?",
        f"From {p[2]} take {p[0]} times {p[1]}. What is left?",
        f"A tank holds {p[2]} litres. {p[0]} buckets of {p[1]} litres are taken out. How many litres are left?",
    ],
    solve=lambda sheet, p: sheet.subtract(p[2], sheet.multiply(p[1], p[0])),
    checks=doubted(_change_check),
)


def _perimeter_alternative(sheet: Scratch, params: Params) -> Value:
    length, width = params
    return sheet.add(sheet.multiply(2, length), sheet.multiply(2, width))


PERIMETER = Family(
    name="rectangle_perimeter",
    draw=lambda rng: (lambda width: (width + rng.randint(1, 40), width))(rng.randint(5, 60)),
    answer=lambda p: 2 * (p[0] + p[1]),
    wordings=lambda p: [
        f"A rectangle is {p[0]} m long and {p[1]} m wide. What is its perimeter in m?",
        f"A garden of {p[0]} m by {p[1]} m gets a fence all around. How many m of fence are needed?",
        f"Find the perimeter in m of a rectangle with sides {p[0]} m and {p[1]} m.",
    ],
    solve=lambda sheet, p: sheet.multiply(2, sheet.add(p[0], p[1])),
    checks=another_way(_perimeter_alternative),
    unit="m",
)

FAMILIES = (TWO_STEP_CHAIN, PRODUCT, LINEAR_EQUATION, SEQUENCE, SQUARES, CHANGE, PERIMETER)
