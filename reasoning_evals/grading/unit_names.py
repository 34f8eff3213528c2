"""Single unit names (``mol``, ``secs``, ``M_odot``), looked up with pint, once each."""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from reasoning_evals.grading.limits import Unreadable


class Unit(NamedTuple):
    """What a unit is in base units: ``value * factor + offset``, with the exponent of each dimension.

    ``angle`` is the exponent of the radian, ``hertz`` whether a frequency in hertz occurs: cycles are not radians.
    """

    factor: float
    dimensions: tuple[tuple[str, Fraction], ...]
    angle: Fraction = Fraction(0)
    hertz: bool = False
    offset: float = 0.0


DIMENSIONLESS = Unit(1.0, ())

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
    "ev": "eV", "mev": "MeV",
}  # fmt: skip
_COUNTED = {
    "photon", "electron", "proton", "neutron", "atom", "molecule", "ion", "nucleus", "nuclei", "particle", "line", "ruling",
    "fringe", "slit", "count", "event", "decay", "disintegration", "collision", "time", "wave", "wavelength", "oscillation",
    "bit", "unit", "pulse", "image", "layer", "order", "mode", "piece", "item",
}  # fmt: skip
"""Things that are counted: no unit of their own."""
_REFUSED = {
    "a", "at", "the", "to", "of", "or", "and", "as", "is", "on", "by", "be", "i", "E", "x", "y", "z", "n", "k", "e", "ks", "pi",
}  # fmt: skip
"""Words and symbols that pint would read as rare units."""
_LOCK = threading.Lock()
_REGISTRY: list[Any] = []


def look_up(name: str) -> Unit:
    """What a name means; Unreadable when it is no unit."""
    unit = _unit_by_name(name)
    if unit is None:
        raise Unreadable(f"{name!r} is not a known unit")
    return unit


@lru_cache(maxsize=4096)
def _unit_by_name(name: str) -> Unit | None:
    singular = name.lower().removesuffix("s")
    if singular in _COUNTED or name.lower() in _COUNTED:
        return DIMENSIONLESS
    if name in _REFUSED or not re.fullmatch(r"[A-Za-zµ°%_'.]+", name):
        return None
    spellings = [_NAMES.get(name, name)]
    if len(name) >= 4:
        spellings += [_NAMES.get(name.lower(), name.lower())]
    for spelling in spellings:
        unit = _from_pint(spelling)
        if unit is not None:
            return unit
    return None


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
        except (pint.errors.PintError, AttributeError, ValueError, TypeError, KeyError):
            return None
    offset = float(zero.magnitude)
    dimensions = sorted((str(key), Fraction(value).limit_denominator(4)) for key, value in one.dimensionality.items())
    angle = Fraction(dict(one.unit_items()).get("radian", 0)).limit_denominator(4)
    return Unit(
        float(one.magnitude) - offset, tuple(dimensions), angle, spelling.lower().endswith(("hz", "hertz")), offset
    )
