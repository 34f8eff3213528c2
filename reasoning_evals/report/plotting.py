"""What the matplotlib figures of reports have in common: style, whiskers, a figure as SVG text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MUTED = "#8a8a8a"
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
}


def style(salt: str, **more: Any) -> Any:
    """Settings for ``matplotlib.rc_context``. ``salt``: makes ids that depend on the drawing alone."""
    return {**_STYLE, "svg.hashsalt": salt, **more}


def whiskers(values: Iterable[tuple[float, float, float]], factor: float) -> list[list[float]]:
    """Lower and upper lengths for (mean, low, high) times a factor; an interval that was cut at 0 or 1 may end on the mean's
    other side by rounding."""
    values = list(values)
    low = [max(0.0, factor * (mean - low)) for mean, low, _ in values]
    high = [max(0.0, factor * (high - mean)) for mean, _, high in values]
    return [low, high]


def finished_svg(figure: Figure, axes: Axes) -> str:
    """Grid and legend added; SVG text that depends on the data alone."""
    axes.grid(color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
