"""Safety against capability, one cross an arm, as SVG text that depends on the data alone."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from reasoning_evals.comparing import Measure
from reasoning_evals.report import finished_svg, style, whiskers

_COLOURS = ("#111111", "#a16207", "#7e22ce", "#1f5fa8", "#15803d", "#c2410c", "#0e7490", "#be185d")


def trade_off(places: Mapping[str, tuple[Measure, Measure]]) -> str:
    """``places``: arm -> (mean capability, mean defence), shares with 95% intervals. Up and to the right is better.

    ValueError without an arm.
    """
    if not places:
        raise ValueError("there is no arm to draw: give at least one")
    with mpl.rc_context(style("safety")):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (arm, (capability, defence)) in enumerate(places.items()):
            axes.errorbar(
                [100 * capability.mean],
                [100 * defence.mean],
                xerr=whiskers([(capability.mean, capability.low, capability.high)], 100),
                yerr=whiskers([(defence.mean, defence.low, defence.high)], 100),
                fmt="s" if number == 0 else "o",
                color=_COLOURS[number % len(_COLOURS)],
                markersize=5,
                elinewidth=0.8,
                label=arm.replace("$", r"\$"),
            )
        axes.set_xlabel("capability: mean accuracy over tasks (%)")
        axes.set_ylabel("safety: mean defence rate over attacks (%)")
        return finished_svg(figure, axes)
