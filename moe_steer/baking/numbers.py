"""Stored numbers: decoded, scaled and encoded again, with a measure of what rounding did.

Only numpy, one piece at a time: a checkpoint is never held in memory and no model library is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding one normal number to nearest, by type."""

LARGEST = {
    "F64": float(np.finfo(np.float64).max),
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": float(np.ldexp(255.0, 120)),
}
"""Largest finite number, by type."""

E8M0_NAN = 255
Floats = npt.NDArray[np.float64]


@dataclass
class Rounding:
    """What storing scaled numbers lost: sums over elements, mergeable with ``+``.

    ``worst`` is the largest relative error of one element (1 for one that became 0); ``error2`` and ``size2`` are sums of
    squares of the errors and of the wanted values; ``inexact``, ``overflowed``, ``not_finite`` (before scaling) and
    ``numbers`` count elements; ``largest`` is the largest magnitude before scaling.
    """

    worst: float = 0.0
    error2: float = 0.0
    size2: float = 0.0
    inexact: int = 0
    overflowed: int = 0
    not_finite: int = 0
    numbers: int = 0
    largest: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        sums = {key: value + getattr(other, key) for key, value in vars(self).items()}
        return Rounding(**{**sums, "worst": max(self.worst, other.worst), "largest": max(self.largest, other.largest)})

    @property
    def rms(self) -> float:
        """Relative error in the root mean square."""
        return float((self.error2 / self.size2) ** 0.5) if self.size2 else 0.0


def decode(raw: bytes, dtype: str) -> Floats:
    """The numbers as float64; ``dtype`` one of ROUNDOFF."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if dtype == "BF16":
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def encode(values: Floats, dtype: str) -> bytes:
    """Round to nearest, ties to even; what is too large becomes infinite."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    quiet_nan = (bits >> np.uint64(16)) | np.uint64(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype("<u2").tobytes()


def scale_floats(raw: bytes, dtype: str, factor: float, *, divide: bool = False) -> tuple[bytes, Rounding]:
    """Every number times (or divided by) ``factor``, rounded to ``dtype``."""
    old = decode(raw, dtype)
    want = scaled(old, factor, divide=divide)
    new = encode(want, dtype)
    return new, measured(old, want, decode(new, dtype), vanished=(want == 0) & (old != 0) & (factor != 0))


def scaled(old: Floats, factor: float, *, divide: bool = False) -> Floats:
    """The exact product or quotient, as far as float64 holds it."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return old / factor if divide else old * factor


def add_floats(raw: bytes, dtype: str, vector: Floats) -> tuple[bytes, Rounding]:
    """Every number plus its counterpart in ``vector`` (float64), rounded to ``dtype``."""
    old = decode(raw, dtype)
    new = encode(old + vector, dtype)
    return new, measured(old, old + vector, decode(new, dtype))


def measured(
    old: Floats, want: Floats, got: Floats, vanished: npt.NDArray[np.bool_] | bool = False, clipped_at: float = np.inf
) -> Rounding:
    """What was lost when ``want`` was stored and ``got`` read back. ``vanished``: products too small even for float64.

    ``clipped_at``: the largest number of a format without infinity, which stores it for all that is larger.
    """
    finite = np.isfinite(old)
    with np.errstate(invalid="ignore", divide="ignore"):
        overflowed = finite & (~np.isfinite(got) | ((np.abs(want) > clipped_at) & (got != want)))
        counted = finite & ~overflowed
        error = np.where(counted, got - want, 0.0)
        relative = np.where(counted & (want != 0), np.abs(error / want), 0.0)
    relative = np.where(vanished, 1.0, relative)
    return Rounding(
        worst=float(relative.max(initial=0.0)),
        error2=float((error**2).sum()),
        size2=float((np.where(counted, want, 0.0) ** 2).sum()),
        inexact=int(np.count_nonzero((error != 0) | vanished)),
        overflowed=int(overflowed.sum()),
        not_finite=int((~finite).sum()),
        numbers=old.size,
        largest=float(np.abs(old[finite]).max(initial=0.0)),
    )


def shift_exponents(raw: bytes, power: int) -> tuple[bytes, Rounding]:
    """E8M0 scales (value 2^(byte - 127), 255 is NaN) times 2^power; what leaves the range 0-254 counts as overflowed."""
    old = np.frombuffer(raw, np.uint8).astype(np.int32)
    new = np.where(old == E8M0_NAN, old, old + power)
    outside = (old != E8M0_NAN) & ((new < 0) | (new >= E8M0_NAN))
    return new.clip(0, E8M0_NAN).astype(np.uint8).tobytes(), Rounding(overflowed=int(outside.sum()), numbers=len(old))


def is_power_of_two(value: float) -> bool:
    """True for 2^k with a whole k."""
    return value > 0 and math.frexp(value)[0] == 0.5


def nearest_power_of_two(value: float) -> float:
    """The power of two with the nearest logarithm: 3 -> 4, 1.4 -> 1; ``value`` > 0."""
    return float(2.0 ** round(math.log2(value)))


def exponent_of(value: float) -> int:
    """k of 2^k."""
    return math.frexp(value)[1] - 1


def shown(number: float) -> str:
    """A number for a message, in as many digits as it takes to give it back: 64, 0.25, 1048576."""
    return repr(float(number)).removesuffix(".0")
