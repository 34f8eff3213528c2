r"""Reads units as written (``m/s^2``, ``J mol^-1 K^-1``, ``\mathrm{kg\cdot m^2}``, ``10^6 m``) into a factor and dimensions.

What people write is put into pint's words: its names (``mol``, ``secs``, ``M_odot``) are looked up one by one, and every sign and
bracket that may be left out is put in. pint then does the arithmetic.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from reasoning_evals.grading.evaluate import number
from reasoning_evals.grading.formula import read_number
from reasoning_evals.grading.latex import clean, unwrap
from reasoning_evals.grading.records import Unreadable

_DEFINITIONS = (
    "solar_mass = 1.98841e30 * kilogram = M_sun = Msun",
    "solar_radius = 6.957e8 * meter = R_sun = Rsun",
    "diopter = 1 / meter = dioptre",
    "tesla_gauss = 1e-4 * tesla",
)
_NAMES = {
    "gauss": "tesla_gauss", "G": "tesla_gauss", "Torr": "torr", "H.P": "horsepower", "HP": "horsepower", "h.p": "horsepower",
    "light_second": "c * second", "light_minute": "c * minute", "light_hour": "c * hour", "ohms": "ohm", "sr": "sr",
    "AU": "astronomical_unit", "sec": "second", "secs": "second", "hr": "hour", "hrs": "hour", "yrs": "year", "mins": "minute",
    "amp": "ampere", "amps": "ampere", "cc": "cm**3", "%": "percent", "'": "arcminute", "''": "arcsecond", "deg": "degree",
    "degs": "degree", "°": "degree", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "micron": "um", "microns": "um",
    "mho": "siemens", "centigrade": "degC", "celsius": "degC", "fahrenheit": "degF", "kelvins": "K", "rads": "radian",
    "m_s": "solar_mass", "M_s": "solar_mass", "M_odot": "solar_mass", "R_odot": "solar_radius", "esu": "statC",
    "c": "speed_of_light", "gm": "gram", "gms": "gram", "kgs": "kg", "Angstrom": "angstrom", "Angstroms": "angstrom",
    "kilohm": "kiloohm", "kilohms": "kiloohm", "megohm": "megaohm", "megohms": "megaohm", "ev": "eV", "mev": "MeV", "Ohm": "ohm", "Ohms": "ohm", "pct": "percent",
}  # fmt: skip
_COUNTED = {
    "photon", "electron", "proton", "neutron", "atom", "molecule", "ion", "nucleus", "nuclei", "particle", "line", "ruling",
    "fringe", "slit", "count", "event", "decay", "disintegration", "collision", "time", "wave", "wavelength", "oscillation",
    "bit", "unit", "pulse", "image", "layer", "order", "mode", "piece", "item",
}  # fmt: skip
"""Things that are counted (5 photons): dimensionless."""
_REFUSED = {
    "a", "at", "the", "to", "of", "or", "and", "as", "is", "on", "by", "be", "i", "E", "x", "y", "z", "n", "k", "e", "ks", "pi",
}  # fmt: skip
"""Words and symbols that pint would read as rare units."""
_LOCK = threading.Lock()
_REGISTRY: list[Any] = []
MAX_UNIT_CHARS = 120
MAX_EXPONENT = 12
_COMPOUND = {
    **{name: "*".join(name) for name in ("Nm", "Ns", "Vs", "Ws", "Am", "Cm", "Ah", "As", "Js", "Wh")},
    "kWh": "kW*h", "mAh": "mA*h", "kgm": "kg*m", "MeVs": "MeV*s", "Pas": "Pa*s",
}  # fmt: skip
"""Products written without a sign between their factors; an exponent after them belongs to the last factor."""
_WRAPPER = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\frac\s+([a-zA-Z])\s*([a-zA-Z])")
_MICRO = re.compile(r"\\mu\s*")
_PREFIXED_OHM = re.compile(r"(?<![A-Za-z])([kKMGmunpT])\s*ohm")
_TOKEN = re.compile(
    r"\s*(?:(\*\*|\^|[*/()]|\\cdot|\\times)|([A-Za-zµ°%_]+(?:\.[A-Za-z](?![A-Za-z]))?|''|')(-?\d+(?![\d.^]))?|(-?\d+(?:/\d+)?))"
)
_SQUARES = re.compile(r"\b(square|sq\.?|cubic|cu\.?)\s+([A-Za-z]+)")
_SQUARED = re.compile(r"\b([A-Za-z]+)[\s-]+(squared|cubed)\b")
_ASIDE = re.compile(r"\s+\([A-Za-z ,.'-]*\)\s*$|[\s,]*\b(?:approximately|approx\.?)$")
_STOP = re.compile(
    r"(?<=\S)[\s,]+(?:to(?:wards?)?|the|from|off|of|on|above|below|along|away|at|with|which|where|when|for|if|is|are|and|or|"
    r"(?:down|up|left|right|for|back|east|west|north|south|out)-?(?:wards?|ern)?|inwards?|(?:north|south)(?:east|west)|"
    r"in\s+(?:the|a|opposite|total|vacuum|air|water|\w+ward)|deeper|higher|lower|clockwise|counter-?clockwise|"
    r"anti-?clockwise|between|behind|before|after|long|wide|tall|high|deep)(?![A-Za-z/^*]).*$",
    re.DOTALL,
)
"""Words after which the unit has ended."""


class Unit(NamedTuple):
    """A unit in base units: ``value * factor + offset``, with the exponent of each dimension.

    ``angle`` is the exponent of the radian, ``hertz`` whether a frequency in hertz occurs: cycles are not radians.
    """

    factor: float
    dimensions: tuple[tuple[str, Fraction], ...]
    angle: Fraction = Fraction(0)
    hertz: bool = False
    offset: float = 0.0


@lru_cache(maxsize=4096)
def _spelling(name: str) -> str:
    """pint's name of a unit; Unreadable when it is not a unit."""
    singular = name.lower().removesuffix("s")
    if singular in _COUNTED or name.lower() in _COUNTED:
        return "dimensionless"
    if name in _REFUSED or not re.fullmatch(r"[A-Za-zµ°%_'.]+", name):
        raise Unreadable(f"{name!r} is not a known unit")
    for spelling in (name, name.lower()) if len(name) >= 4 else (name,):
        spelling = _NAMES.get(spelling, spelling)
        if _from_pint(spelling) is not None:
            return f"({spelling})"
    raise Unreadable(f"{name!r} is not a known unit")


@lru_cache(maxsize=4096)
def _from_pint(spelling: str) -> Unit | None:
    import pint

    with _LOCK:
        if not _REGISTRY:
            registry: Any = pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
            for definition in _DEFINITIONS:
                registry.define(definition)
            _REGISTRY.append(registry)
        registry = _REGISTRY[0]
        try:
            unit = registry.parse_units(spelling)
            one = registry.Quantity(1.0, unit).to_base_units()
            zero = registry.Quantity(0.0, unit).to_base_units()
        except Exception:  # its parser raises whatever Python's tokenizer and arithmetic raise
            return None
    offset = float(zero.magnitude)
    dimensions = sorted((str(key), Fraction(value).limit_denominator(4)) for key, value in one.dimensionality.items())
    angle = Fraction(dict(one.unit_items()).get("radian", 0)).limit_denominator(4)
    hertz = bool(re.search(r"(?:hz|hertz)(?![a-z])", spelling.lower()))
    return Unit(float(one.magnitude) - offset, tuple(dimensions), angle, hertz, offset)


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> tuple[Unit, ...]:
    """The possible meanings of a unit, best first; empty when it is unknown.

    ``J/kg K`` has two: J/(kg K), which people mean, and (J/kg) K, which the rules of arithmetic say. An empty text is
    dimensionless. A number before the unit (``10^6 m``) belongs to the factor.
    """
    text = clean(text)
    factor = 1.0
    if re.match(r"[\d.]|\(\s*\d|\\frac|-", text):
        try:
            reading = read_number(text)
            factor, text = float(number(reading.tree)), text[reading.end :]
        except (Unreadable, OverflowError):
            if not text.startswith("\\frac"):  # \frac{m}{s} is a unit
                return ()
    surface = unit_surface(text)
    if not surface:
        return (Unit(factor, ()),)
    if len(surface) > MAX_UNIT_CHARS:
        return ()
    found: list[Unit] = []
    per_second = re.sub(r"\bms(?=\s*\^?\s*-)", "m s", surface)  # ms^-1 is m/s more often than 1/(1000 s)
    for written, grouped in ((surface, True), (surface, False), *[(per_second, True)] * (per_second != surface)):
        try:
            unit = _from_pint(_in_pints_words(written, grouped))
        except Unreadable:
            continue
        if unit and (unit := unit._replace(factor=unit.factor * factor)) not in found:
            found.append(unit)
    return tuple(found)


@lru_cache(maxsize=4096)
def unit_surface(text: str) -> str:
    """A unit as plain text, without markup and the words around it. Equal texts are equal units."""
    text = re.sub(r"\\%", "%", unwrap(text))
    text = re.sub(
        r"\^\s*\\circ\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF])(?![a-zA-Z]))", lambda m: f" deg{m[1] or m[2]} ", text
    )
    text = re.sub(r"\^\s*\\circ(?![a-zA-Z])", " degree ", text)
    for _ in range(3):
        text = _WRAPPER.sub(lambda match: f" {match[1]} " if match[1] != "k" else "k", text)
    for sign, word in ((r"\Omega", " ohm "), (r"\AA", " angstrom "), (r"\odot", "odot"), ("_{odot}", "_odot")):
        text = text.replace(sign, word)
    text = re.sub("µ +", "µ", _MICRO.sub("µ", text))
    text = re.sub(r"\^\s*[{(]\s*([+-]?\s*\d+(?:/\d+)?)\s*[)}]", r"^\1 ", text)
    text = _FRACTION.sub(lambda match: f"({match[1] or match[3] or 1})/({match[2] or match[4]})", text)
    text = re.sub(r"[{}\[\]]", " ", text)
    text = _PREFIXED_OHM.sub(r"\1ohm", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = _ASIDE.sub("", " " + text).strip() if not re.match(r"[^()]*[/*]\s*\(", text) else text
    text = _STOP.sub("", text).strip()
    text = re.sub(r"\bper\b", "/", re.sub(r"\bper\s+cent\b", "percent", text))
    text = re.sub(r"\belectron[\s-]+(volts?)\b", r"electron_\1", text)
    text = re.sub(
        r"\bdegrees?\s+(celsius|fahrenheit|C|F)\b", lambda m: f"deg{m[1][0].upper()}", text, flags=re.IGNORECASE
    )
    text = re.sub(r"\blight[\s-]+(year|second|minute|hour)s?\b", r"light_\1", text)
    text = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])|(?<=[A-Za-z]{2})\.(?=\s)", " ", text)
    text = _SQUARES.sub(lambda match: f"{match[2]}^{2 if match[1].startswith('sq') else 3}", text)
    text = _SQUARED.sub(lambda match: f"{match[1]}^{2 if match[2] == 'squared' else 3}", text)
    return text.strip(" .,;:")


def known_unit(text: str) -> bool:
    """Whether the text reads as a unit that is not empty."""
    return bool(unit_surface(clean(text))) and bool(parse_unit(text))


def _in_pints_words(text: str, grouped: bool) -> str:
    """A unit as pint reads it. ``grouped``: everything after a slash is in the denominator, J/kg K is J/(kg K)."""
    words: list[str] = []
    below = [False]
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise Unreadable("not a unit")
        position = match.end()
        operator, name, exponent, digits = match.groups()
        last = words[-1] if words else "("
        if operator == "/":
            words += ["1", "/"] if last == "(" else ["/"]
            below[-1] = True
        elif operator == ")" and len(below) > 1:
            words.append(")")
            below.pop()
        elif operator in ("^", "**") and not last.startswith("**"):
            words.append("^")
        elif digits and last == "^" and re.fullmatch(r"-?\d{1,9}(?:/0*[1-9]\d{0,9})?", digits):
            if not 0 < abs(Fraction(digits)) <= MAX_EXPONENT:
                raise Unreadable("a unit with such an exponent is not read")
            words[-1] = f"**({digits})"
        elif name or operator in ("*", "(", "\\cdot", "\\times") or (digits == "1" and last == "("):
            if last not in ("(", "*", "/") and digits is None:
                words.append("/" if below[-1] and grouped else "*")
            if operator == "(":
                below.append(False)
            if operator in (None, "("):
                words.append(operator or digits or "*".join(map(_spelling, _COMPOUND.get(name, name).split("*"))))
            if exponent:
                words.append(f"**({exponent})")
        else:
            raise Unreadable("not a unit")
    return "".join(words)
