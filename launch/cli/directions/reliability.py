"""The reliability plot of a probe: what it predicted against what was, on held-out problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from expert_stats.plots import ACCURACY, MUTED, STYLE, svg_text


def reliability(held_out: Mapping[str, Any], title: str) -> str:
    """SVG; ``held_out`` of a probe's header."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
        predicted = [one["predicted"] for one in held_out["bins"]]
        observed = [one["observed"] for one in held_out["bins"]]
        axes.plot(predicted, observed, color=ACCURACY, marker="o", markersize=4, linewidth=1.2)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted probability", ylabel="observed share")
        axes.set_title(title)
        axes.text(0.02, 0.95, f"AUC {held_out['auc']:.3f} ({held_out['low']:.3f} to {held_out['high']:.3f})")
        axes.text(0.02, 0.89, f"calibration error {held_out['calibration_error']:.3f}")
        return svg_text(figure)
