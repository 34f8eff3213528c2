"""Accuracy against thinking length for many settings: one curve a method, the arms of the test with both intervals.

Also what all matplotlib figures of reports share: style, whiskers, conversion to SVG text.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
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

_COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4d7c0f", "#44403c")


def style(salt: str, **more: Any) -> Any:
    """Settings for ``matplotlib.rc_context``. ``salt``: makes ids in the SVG depend on the drawing only."""
    return {**_STYLE, "svg.hashsalt": salt, **more}


def whiskers(values: Iterable[tuple[float, float, float]], factor: float) -> list[list[float]]:
    """Lower and upper lengths for (mean, low, high) times a factor; clipped at 0, because an interval that was cut at 0 or
    1 may end on the wrong side of the mean by rounding."""
    values = list(values)
    low = [max(0.0, factor * (mean - low)) for mean, low, _ in values]
    high = [max(0.0, factor * (high - mean)) for mean, _, high in values]
    return [low, high]


def finished_svg(figure: Figure, axes: Axes) -> str:
    """Add grid and legend; return SVG text that depends on the data only."""
    axes.grid(color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


class ArmPoint(NamedTuple):
    """One setting: mean thinking tokens and accuracy (a share), each with its interval."""

    label: str
    tokens: float
    tokens_low: float
    tokens_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def frontier(curves: Mapping[str, Sequence[ArmPoint]], baseline: ArmPoint, chosen: Sequence[str] = ()) -> str:
    """SVG text. ``curves``: method -> its settings in order of strength; a curve starts at the unsteered model.

    ``chosen``: labels that are ringed. Up and to the left is better. ValueError without a curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw: give the settings of at least one method")
    with mpl.rc_context(style("reasoning_evals", **{"axes.edgecolor": MUTED})):
        figure = Figure(figsize=(8.6, 4.9), layout="constrained")
        axes = figure.subplots()
        axes.axhline(100 * baseline.accuracy, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)
        axes.axvline(baseline.tokens, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)
        for number, (method, places) in enumerate(curves.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            x = [baseline.tokens, *(place.tokens for place in places)]
            y = [100 * baseline.accuracy, *(100 * place.accuracy for place in places)]
            axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.5, zorder=2)
            axes.errorbar(
                x[1:],
                y[1:],
                xerr=whiskers([(p.tokens, p.tokens_low, p.tokens_high) for p in places], 1),
                yerr=whiskers([(p.accuracy, p.accuracy_low, p.accuracy_high) for p in places], 100),
                fmt="o",
                color=colour,
                markersize=4,
                elinewidth=0.7,
                label=method.replace("$", r"\$"),
                zorder=3,
            )
            for place in places:
                if place.label in chosen:
                    axes.plot(place.tokens, 100 * place.accuracy, "o", ms=10, mfc="none", mec=colour, mew=1.4, zorder=4)
        axes.plot(
            baseline.tokens, 100 * baseline.accuracy, "s", color="#111111", markersize=6, label="baseline", zorder=5
        )
        axes.set_xlabel("thinking tokens per answer")
        axes.set_ylabel("accuracy (%)")
        return finished_svg(figure, axes)
