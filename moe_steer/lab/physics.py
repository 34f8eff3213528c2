"""Families of physics problems: motion, force, energy, circuits, density, power, momentum and waves; every number has its
unit."""

from __future__ import annotations

from moe_steer.lab.family import Family, Params, Scratch, Value, another_way, doubted


def _motion_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    start, acceleration, time = params
    gained = sheet.subtract(int(value), start) if int(value) >= start else 0
    return gained, sheet.multiply(acceleration, time)


VELOCITY = Family(
    name="velocity",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 15)),
    answer=lambda p: p[0] + p[1] * p[2],
    wordings=lambda p: [
        f"A car moves at {p[0]} m/s and speeds up by {p[1]} m/s^2 for {p[2]} s. What is its final speed in m/s?",
        f"Find the final speed in m/s: first speed {p[0]} m/s, acceleration {p[1]} m/s^2, time {p[2]} s.",
        f"A train at {p[0]} m/s accelerates at {p[1]} m/s^2. How fast is it in m/s after {p[2]} s?",
    ],
    solve=lambda sheet, p: sheet.add(p[0], sheet.multiply(p[1], p[2])),
    checks=doubted(_motion_check),
    unit="m/s",
)

DISTANCE = Family(
    name="distance",
    domain="physics",
    draw=lambda rng: (rng.randint(3, 25), rng.randint(2, 9), rng.randint(3, 25)),
    answer=lambda p: p[0] * p[1] + p[2] * p[1],
    wordings=lambda p: [
        f"A runner moves at {p[0]} m/s for {p[1]} s and then at {p[2]} m/s for {p[1]} s. How far is that in m?",
        f"Two carts leave one point in opposite directions at {p[0]} m/s and {p[2]} m/s. How many m apart are they after {p[1]} s?",
        f"A bike rides {p[1]} s at {p[0]} m/s and {p[1]} s at {p[2]} m/s. What distance in m is covered?",
    ],
    solve=lambda sheet, p: sheet.add(sheet.multiply(p[0], p[1]), sheet.multiply(p[2], p[1])),
    checks=another_way(lambda sheet, p: sheet.multiply(sheet.add(p[0], p[2]), p[1])),
    unit="m",
)


def _newton_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    mass, acceleration, friction = params
    return sheet.add(sheet.multiply(mass, int(value)), friction), mass * acceleration + friction


NEWTON = Family(
    name="newton",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 20)),
    answer=lambda p: p[1],
    wordings=lambda p: [
        f"A force of {p[0] * p[1] + p[2]} N pulls a {p[0]} kg box against {p[2]} N of friction. Find its acceleration in m/s^2.",
        f"A {p[0]} kg cart is pushed with {p[0] * p[1] + p[2]} N and friction is {p[2]} N. What is its acceleration in m/s^2?",
        f"The friction on a {p[0]} kg sled is {p[2]} N and the pull is {p[0] * p[1] + p[2]} N. At how many m/s^2 does it speed up?",
    ],
    solve=lambda sheet, p: sheet.divide(sheet.subtract(p[0] * p[1] + p[2], p[2]), p[0]),
    checks=doubted(_newton_check),
    unit="m/s^2",
)

KINETIC_ENERGY = Family(
    name="kinetic_energy",
    domain="physics",
    draw=lambda rng: (2 * rng.randint(2, 40), rng.randint(2, 9)),
    answer=lambda p: p[0] * p[1] ** 2 // 2,
    wordings=lambda p: [
        f"What is the kinetic energy in J of a {p[0]} kg ball at {p[1]} m/s?",
        f"A mass of {p[0]} kg moves at {p[1]} m/s. Find its kinetic energy in J.",
        f"How many J of kinetic energy has a {p[0]} kg cart with a speed of {p[1]} m/s?",
    ],
    solve=lambda sheet, p: sheet.multiply(sheet.multiply(sheet.divide(p[0], 2), p[1]), p[1]),
    checks=another_way(
        lambda sheet, p: sheet.divide(sheet.multiply(sheet.multiply(p[0], p[1]), p[1]), 2),
    ),
    unit="J",
)

POTENTIAL_ENERGY = Family(
    name="potential_energy",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 60), rng.randint(2, 9)),
    answer=lambda p: p[0] * p[1] * 10,
    wordings=lambda p: [
        f"A {p[0]} kg stone is lifted by {p[1]} m. With g = 10 m/s^2, what is its potential energy in J?",
        f"Find the potential energy in J of {p[0]} kg at a height of {p[1]} m. Use g = 10 m/s^2.",
        f"How many J does it take to raise {p[0]} kg by {p[1]} m if g = 10 m/s^2?",
    ],
    solve=lambda sheet, p: sheet.multiply(sheet.multiply(p[0], p[1]), 10),
    checks=another_way(lambda sheet, p: sheet.multiply(sheet.multiply(p[0], 10), p[1])),
    unit="J",
)


def _ohm_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    first, second, current = params
    part = sheet.multiply(first, current)
    rest = sheet.subtract(int(value), part) if int(value) >= part else 0
    return rest, sheet.multiply(second, current)


OHM = Family(
    name="ohm",
    domain="physics",
    draw=lambda rng: (*sorted((rng.randint(2, 30), rng.randint(2, 30))), rng.randint(2, 9)),
    answer=lambda p: (p[0] + p[1]) * p[2],
    wordings=lambda p: [
        f"Resistors of {p[0]} ohm and {p[1]} ohm are in series and carry {p[2]} A. What is the voltage in V?",
        f"A current of {p[2]} A flows through {p[0]} ohm and {p[1]} ohm in series. Find the total voltage in V.",
        f"How many V drive {p[2]} A through a series of {p[0]} ohm and {p[1]} ohm?",
    ],
    solve=lambda sheet, p: sheet.multiply(sheet.add(p[0], p[1]), p[2]),
    checks=doubted(_ohm_check),
    unit="V",
)

WORK = Family(
    name="work",
    domain="physics",
    draw=lambda rng: (lambda f: (f + rng.randint(5, 60), f, rng.randint(2, 9)))(rng.randint(2, 30)),
    answer=lambda p: (p[0] - p[1]) * p[2],
    wordings=lambda p: [
        f"A box is pushed with {p[0]} N against {p[1]} N of friction over {p[2]} m. What is the net work in J?",
        f"Find the net work in J: push {p[0]} N, friction {p[1]} N, distance {p[2]} m.",
        f"Friction of {p[1]} N acts on a sled pulled with {p[0]} N for {p[2]} m. How many J of net work are done?",
    ],
    solve=lambda sheet, p: sheet.multiply(sheet.subtract(p[0], p[1]), p[2]),
    checks=another_way(
        lambda sheet, p: sheet.subtract(sheet.multiply(p[0], p[2]), sheet.multiply(p[1], p[2])),
    ),
    unit="J",
)


def _quotient_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    divisor, quotient = params
    return sheet.multiply(divisor, int(value)), divisor * quotient


DENSITY = Family(
    name="density",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(3, 45)),
    answer=lambda p: p[1],
    wordings=lambda p: [
        f"{p[0] * p[1]} kg of a liquid fill {p[0]} m^3. What is its density in kg/m^3?",
        f"Find the density in kg/m^3 of a body with mass {p[0] * p[1]} kg and volume {p[0]} m^3.",
        f"A block of {p[0]} m^3 has a mass of {p[0] * p[1]} kg. How many kg/m^3 is its density?",
    ],
    solve=lambda sheet, p: sheet.divide(p[0] * p[1], p[0]),
    checks=doubted(_quotient_check),
    unit="kg/m^3",
)


def _power_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    time, power, loss = params
    return sheet.add(sheet.multiply(time, int(value)), loss), time * power + loss


POWER = Family(
    name="power",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(3, 30), rng.randint(2, 20)),
    answer=lambda p: p[1],
    wordings=lambda p: [
        f"A motor takes {p[0] * p[1] + p[2]} J in {p[0]} s and loses {p[2]} J as heat. What is its useful power in W?",
        f"Of {p[0] * p[1] + p[2]} J used in {p[0]} s, {p[2]} J are lost. Find the useful power in W.",
        f"A lift gets {p[0] * p[1] + p[2]} J, wastes {p[2]} J and works for {p[0]} s. How many W of power is useful?",
    ],
    solve=lambda sheet, p: sheet.divide(sheet.subtract(p[0] * p[1] + p[2], p[2]), p[0]),
    checks=doubted(_power_check),
    unit="W",
)


def _momentum_check(sheet: Scratch, params: Params, value: Value) -> tuple[Value, Value]:
    mass, speed, other_mass, other_speed = params
    part = sheet.multiply(mass, speed)
    return sheet.subtract(int(value), part) if int(value) >= part else 0, sheet.multiply(other_mass, other_speed)


MOMENTUM = Family(
    name="momentum",
    domain="physics",
    draw=lambda rng: (rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 12)),
    answer=lambda p: p[0] * p[1] + p[2] * p[3],
    wordings=lambda p: [
        f"A {p[0]} kg cart at {p[1]} m/s and a {p[2]} kg cart at {p[3]} m/s move the same way. Find the total momentum in kg*m/s.",
        f"What is the total momentum in kg*m/s of {p[0]} kg at {p[1]} m/s and {p[2]} kg at {p[3]} m/s in one direction?",
        f"Two balls roll east: {p[0]} kg with {p[1]} m/s and {p[2]} kg with {p[3]} m/s. How many kg*m/s of momentum is that?",
    ],
    solve=lambda sheet, p: sheet.add(sheet.multiply(p[0], p[1]), sheet.multiply(p[2], p[3])),
    checks=doubted(_momentum_check),
    unit="kg*m/s",
)


def _wave_alternative(sheet: Scratch, params: Params) -> Value:
    frequency, length = params
    tens, ones = frequency - frequency % 10, frequency % 10
    first = sheet.multiply(length, tens)
    return first if ones == 0 else sheet.add(first, sheet.multiply(length, ones))


WAVE_SPEED = Family(
    name="wave_speed",
    domain="physics",
    draw=lambda rng: (rng.randint(11, 99), rng.randint(2, 9)),
    answer=lambda p: p[0] * p[1],
    wordings=lambda p: [
        f"A wave has a frequency of {p[0]} Hz and a wavelength of {p[1]} m. What is its speed in m/s?",
        f"Find the speed in m/s of a wave with {p[0]} Hz and a wavelength of {p[1]} m.",
        f"Waves of length {p[1]} m come {p[0]} times each second. How many m/s do they travel?",
    ],
    solve=lambda sheet, p: sheet.multiply(p[0], p[1]),
    checks=another_way(_wave_alternative),
    unit="m/s",
)

FAMILIES = (
    VELOCITY, DISTANCE, NEWTON, KINETIC_ENERGY, POTENTIAL_ENERGY, OHM, WORK,
    DENSITY, POWER, MOMENTUM, WAVE_SPEED,
)  # fmt: skip
