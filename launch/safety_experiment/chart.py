"""Safety against capability, one cross an arm, as SVG text that depends on the data alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from reasoning_evals.comparison import Measure

_COLOURS = ("#111111", "#a16207", "#7e22ce", "#1f5fa8", "#15803d", "#c2410c", "#0e7490", "#be185d")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "safety",
    "svg.fonttype": "path",
}


def trade_off(places: Mapping[str, tuple[Measure, Measure]]) -> str:
    """``places``: arm -> (mean capability, mean defence), shares with 95% intervals. Up and to the right is better.

    ValueError without an arm.
    """
    if not places:
        raise ValueError("there is no arm to draw: give at least one")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (arm, (capability, defence)) in enumerate(places.items()):
            axes.errorbar(
                [100 * capability.mean],
                [100 * defence.mean],
                xerr=_whiskers(capability),
                yerr=_whiskers(defence),
                fmt="s" if number == 0 else "o",
                color=_COLOURS[number % len(_COLOURS)],
                markersize=5,
                elinewidth=0.8,
                label=arm.replace("$", r"\$"),
            )
        axes.set_xlabel("capability: mean accuracy over tasks (%)")
        axes.set_ylabel("safety: mean defence rate over attacks (%)")
        axes.grid(color="#ececec", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _whiskers(measure: Measure) -> list[list[float]]:
    """Lower and upper arm lengths; rounding may put an end on the mean's other side."""
    return [[max(0.0, 100 * (measure.mean - measure.low))], [max(0.0, 100 * (measure.high - measure.mean))]]
