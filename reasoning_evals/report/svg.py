"""Small SVG drawings that take their colours from the page, for light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from moe_steer.errors import visible


class Scale(NamedTuple):
    """Data to page coordinates, linear."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers inside [low, high].

    >>> ticks(0, 1), ticks(37, 112)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [40.0, 60.0, 80.0, 100.0])
    """
    step = 10 ** math.floor(math.log10((high - low) / 5))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def padded(low: float, high: float, share: float = 0.08, least: float = 1e-9) -> tuple[float, float]:
    """A range with a margin on both sides; never empty."""
    width = max(high - low, least)
    middle = (low + high) / 2
    return middle - width * (0.5 + share), middle + width * (0.5 + share)


def drawing(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """The whole <svg>; ``label`` is for screen readers, "" for a drawing that repeats what stands beside it."""
    spoken = f'role="img" aria-label="{_shown(label)}"' if label else 'aria-hidden="true"'
    return f'<svg viewBox="0 0 {width:g} {height:g}" {spoken} style="max-width:{width:g}px">{"".join(parts)}</svg>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A stroke; ``kind`` is its CSS class."""
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def text(x: float, y: float, content: object, kind: str = "label", anchor: str = "middle") -> str:
    """A text; ``anchor`` is start, middle or end."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{_shown(content)}</text>'


def dot(x: float, y: float, radius: float, kind: str, tip: str = "") -> str:
    """A filled circle; ``tip`` is its tooltip."""
    inside = f"<title>{_shown(tip)}</title>" if tip else ""
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}">{inside}</circle>'


def bar(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    """A filled rectangle."""
    inside = f"<title>{_shown(tip)}</title>" if tip else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}">{inside}</rect>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A polygon line through the points."""
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
    return f'<path class="{kind}" d="{steps}"/>'


def bottom_axis(scale: Scale, top: float, bottom: float, title: str, form: str = "{:g}") -> list[str]:
    """Grid lines and numbers along x."""
    parts = []
    for value in ticks(scale.low, scale.high):
        x = scale(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 18, _number(value, form))]
    middle = (scale.start + scale.end) / 2
    return [*parts, text(middle, bottom + 38, title, "axis-title")]


def left_axis(scale: Scale, left: float, right: float, title: str, form: str = "{:g}") -> list[str]:
    """Grid lines and numbers along y; the title is above the axis, not rotated."""
    parts = []
    for value in ticks(scale.low, scale.high):
        y = scale(value)
        parts += [line(left, y, right, y, "grid"), text(left - 8, y + 4, _number(value, form), anchor="end")]
    top = min(scale.start, scale.end)
    return [*parts, text(0, top - 14, title, "axis-title", "start")]


def _number(value: float, form: str) -> str:
    return form.format(value).replace("-", "−") if value else "0"


def _shown(content: object) -> str:
    """Text from anywhere, such as an arm's name, as it may stand in a drawing."""
    return escape(visible(content))
