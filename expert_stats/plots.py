"""Figures for reports, as SVG text that depends only on the data: heat map and dose-response. Others: `expert_stats.rivals.pictures`."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from expert_stats.scores import ExpertScores
from moe_steer.plan import SteeringPlan

Array = np.ndarray[Any, Any]

RING, POINTER, INK, MUTED = "#111111", "#d62728", "#222222", "#8a8a8a"
ACCURACY, TOKENS = "#1f5fa8", "#b35c00"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "expert_stats",
    "svg.fonttype": "path",
}
_PALE, _GREY = (0.93, 0.93, 0.93, 1.0), (0.72, 0.72, 0.72, 1.0)
_PROVEN = "#0a7d33"
_SHOWN = 0.05
"""The q up to which a cell is outlined."""


class DosePoint(NamedTuple):
    """Outcome at one gain; each number with its interval. Accuracy is a share, tokens a mean."""

    gain: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tokens: float
    tokens_low: float
    tokens_high: float


def heat_map(scores: ExpertScores, plan: SteeringPlan | None = None, placebo: SteeringPlan | None = None) -> str:
    """Score of every expert, layers down and experts across; chosen experts have a ring, placebo experts a box, those with evidence
    (q at most .05) an outline.

    Red experts go with the start of a thought, blue ones against it; pale cells have too little support to be chosen, grey
    ones have no defined score.
    """
    num_layers, num_experts = scores.score_LE.shape
    across, down = min(0.34, max(0.036, 9.5 / num_experts)), min(0.34, max(0.085, 5.5 / num_layers))  # inches per cell
    width, height = max(across * num_experts, 4.6), down * num_layers
    title = textwrap.wrap(_formula(scores), int(13 * (width + 0.6)))  # about 13 letters to an inch
    left, below, full_width, full_height = 0.55, 0.62, width + 1.35, height + 0.95 + 0.17 * (len(title) - 1)
    finite = scores.score_LE[np.isfinite(scores.score_LE)]
    reach = max(0.1, float(np.abs(finite).max())) if finite.size else 1.0
    scale = ScalarMappable(Normalize(-reach, reach), mpl.colormaps["RdBu_r"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(full_width, full_height))
        box = (left / full_width, below / full_height, width / full_width, height / full_height)
        axes = figure.add_axes(box)
        axes.imshow(
            _cell_colours(scores, scale),
            interpolation="none",
            aspect="auto",
            extent=(-0.5, num_experts - 0.5, num_layers - 0.5, -0.5),
        )
        proven = _outline(axes, scores, min(across, down) * 72)
        size = max(38.0, (min(across, down) * 72 * 0.8) ** 2)
        _mark(axes, scores, plan, "o", size)
        _mark(axes, scores, placebo, "s", size)
        _ticks(axes, scores.layers, num_experts)
        axes.set_xlabel("expert", loc="left")
        axes.set_ylabel("layer")
        axes.set_title("\n".join(title), loc="left", pad=6)
        _legend(figure, plan, placebo, proven, at=((left + width) / full_width, 0.05 / full_height))
        bar_box = ((left + width + 0.16) / full_width, box[1], 0.13 / full_width, box[3])
        bar = figure.colorbar(scale, cax=figure.add_axes(bar_box), ticks=MaxNLocator(5, symmetric=True))
        bar.outline.set_visible(False)
        return svg_text(figure)


def dose_response(points: Sequence[DosePoint], baseline: DosePoint | None = None, chosen: float | None = None) -> str:
    """Accuracy and thinking tokens against the gain (log axis; a gain of 0 is placed separately at the left), with intervals.

    ``baseline``: the unsteered outcome, drawn as a dashed line with a band. ``chosen``: the gain to point out.
    """
    if not points:
        raise ValueError("there is no point to draw: give the outcome of at least one gain")
    points = sorted(points)
    positive = [point.gain for point in points if point.gain > 0]
    lowest = math.log2(min(positive, default=1.0))
    places = [math.log2(point.gain) if point.gain > 0 else lowest - 1.5 for point in points]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.3), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, name, colour, factor in ((upper, "accuracy", ACCURACY, 100.0), (lower, "tokens", TOKENS, 1.0)):
            _curve(axes, places, points, name, colour, factor)
            if baseline is not None:
                middle, low, high = (factor * value for value in _outcome(baseline, name))
                axes.axhspan(low, high, color=MUTED, alpha=0.14, linewidth=0)
                axes.axhline(middle, color=MUTED, linestyle="--", linewidth=1.2, label="unsteered")
            if chosen is not None and chosen in [point.gain for point in points]:
                at = places[[point.gain for point in points].index(chosen)]
                axes.axvline(at, color=POINTER, linewidth=1, alpha=0.6, label="chosen gain")
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            axes.set_axisbelow(True)
        upper.set_ylabel("accuracy (%)")
        lower.set_ylabel("thinking tokens")
        lower.set_xlabel("gain")
        lower.set_xticks(places, [f"{point.gain:g}" for point in points])
        lower.set_ylim(bottom=0)
        if baseline is not None or chosen is not None:
            upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
        return svg_text(figure)


def _curve(
    axes: Axes, places: Sequence[float], points: Sequence[DosePoint], name: str, colour: str, factor: float
) -> None:
    middle, low, high = (factor * np.array(column) for column in zip(*(_outcome(p, name) for p in points), strict=True))
    axes.errorbar(
        places,
        middle,
        yerr=[middle - low, high - middle],
        color=colour,
        fmt="o",
        markersize=4.5,
        elinewidth=1.1,
        capsize=2.5,
    )
    on_axis = [index for index, point in enumerate(points) if point.gain > 0]  # a gain of 0 has no place on a log axis
    axes.plot([places[index] for index in on_axis], middle[on_axis], color=colour, linewidth=1.4)


def _outcome(point: DosePoint, name: str) -> tuple[float, float, float]:
    return getattr(point, name), getattr(point, f"{name}_low"), getattr(point, f"{name}_high")


def _cell_colours(scores: ExpertScores, scale: ScalarMappable) -> Array:
    """RGBA of every cell, each repeated to several pixels, so that viewers which smooth images blur only the edges."""
    colours = np.asarray(scale.to_rgba(np.nan_to_num(scores.score_LE)))
    colours[~scores.supported_LE] = 0.4 * colours[~scores.supported_LE] + 0.6 * np.array(_PALE)
    colours[~np.isfinite(scores.score_LE)] = _GREY
    num_layers, num_experts = scores.score_LE.shape
    pixels = colours.repeat(max(8, 400 // num_layers), axis=0).repeat(max(6, 1200 // num_experts), axis=1)
    return np.asarray((pixels * 255).round().astype(np.uint8))


def _outline(axes: Axes, scores: ExpertScores, size: float) -> bool:
    """A frame around every supported expert with evidence: green, which neither scale nor rings have. ``size``: of a cell, in
    points. Whether there is any."""
    found = np.argwhere(scores.supported_LE & (scores.q_LE <= _SHOWN)).tolist()
    # Cells of a wide model are two points across: there the frame stands around the cell's neighbours as well.
    beyond = 0.5 + max(0.0, (5.0 - size) / 2 / size)
    for row, column in found:
        for colour, width in (("white", 2.6), (_PROVEN, 1.5)):
            place = (column - beyond, row - beyond)
            axes.add_patch(
                Rectangle(
                    place,
                    2 * beyond,
                    2 * beyond,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                    zorder=2,
                    clip_on=False,
                )
            )
    return bool(found)


def _mark(axes: Axes, scores: ExpertScores, plan: SteeringPlan | None, shape: str, size: float) -> None:
    """Ring the experts of a plan: a white ring under a black one is visible on any colour."""
    if plan is None:
        return
    ys = [scores.layers.index(entry.layer) for entry in plan.experts]
    xs = [entry.expert for entry in plan.experts]
    for edge, width in (("white", 3.4), (RING, 1.6)):
        axes.scatter(
            xs, ys, marker=shape, s=size, facecolors="none", edgecolors=edge, linewidths=width, zorder=3, clip_on=False
        )


def _legend(
    figure: Figure, plan: SteeringPlan | None, placebo: SteeringPlan | None, proven: bool, at: tuple[float, float]
) -> None:
    def ring(shape: str, label: str) -> Line2D:
        return Line2D(
            [], [], marker=shape, color=RING, markerfacecolor="none", linestyle="none", markersize=6.5, label=label
        )

    handles: list[Artist] = [ring("o", "chosen")] if plan is not None else []
    handles += [ring("s", "placebo")] if placebo is not None else []
    handles += [Patch(facecolor="none", edgecolor=_PROVEN, linewidth=1.6, label="evidence")] if proven else []
    handles += [Patch(color=_PALE, label="pale: little support"), Patch(color=_GREY, label="undefined")]
    figure.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=at,
        ncols=len(handles),
        frameon=False,
        borderaxespad=0.0,
        fontsize=8,
        columnspacing=1.1,
        handletextpad=0.4,
        handlelength=1.1,
    )


def _ticks(axes: Axes, layers: Iterable[int], num_experts: int) -> None:
    names = list(layers)
    rows = _every(len(names), 30)
    axes.set_yticks(rows, [str(names[row]) for row in rows])
    axes.set_xticks(_every(num_experts, 33))
    axes.tick_params(length=2.5, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def _every(length: int, most: int) -> list[int]:
    """Indices at a round step, at most ``most`` of them."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, length) if length / step <= most)
    return list(range(0, length, step))


def _formula(scores: ExpertScores) -> str:
    if words := scores.method["words"]:
        return f"{scores.options['by']}: {words}"
    terms = [
        f"{'−' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}nPMI({name})"
        for name, weight in zip(scores.marker_names, scores.coefficients, strict=True)
        if weight
    ]
    return " ".join(terms).removeprefix("+ ")


def svg_text(figure: Figure) -> str:
    """SVG text without date and with fixed ids, starting at the root element, so that it can be embedded in HTML."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=100)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


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
