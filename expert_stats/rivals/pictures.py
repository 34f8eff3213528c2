"""Pictures of rankings, as SVG text: the best with their intervals, whether several rankings agree, one score against another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expert_stats.plots import ACCURACY, INK, MUTED, STYLE, Array, svg_text
from expert_stats.scores import ExpertScores

Reach = Sequence[float | None]
"""A value and the ends of its interval; None where it is not defined."""


def rank_stability(scores: ExpertScores, top: int = 15) -> str:
    """Left: the best experts, each with a 95% interval (thick): from problems that did not choose it where other counts measured it,
    else that of an expert named beforehand; and down to the lower bound that holds for all together, so for whichever is chosen
    (thin, with a tick). Right: the scores from two halves of the problems."""
    rows, elsewhere = scores.ranking()[:top], scores.elsewhere
    if not rows:
        raise ValueError("no expert is supported: there is no ranking to draw")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, max(2.9, 0.24 * len(rows) + 1.1)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        places = np.arange(len(rows))
        for place, row in zip(places, rows, strict=True):
            shown = elsewhere.get((row.layer, row.expert), row)
            if math.isfinite(shown.low):
                left.plot(
                    [shown.low, shown.high],
                    [place, place],
                    color=ACCURACY,
                    linewidth=2.6,
                    alpha=0.55,
                    solid_capstyle="butt",
                )
            if math.isfinite(row.bound):
                left.plot([row.bound, row.score], [place, place], color=ACCURACY, linewidth=0.9)
                left.plot([row.bound], [place], marker="|", markersize=7, markeredgewidth=1.4, color=ACCURACY)
        for proven, face in ((True, ACCURACY), (False, "white")):
            own = [(row.score, place) for row, place in zip(rows, places, strict=True) if (row.q <= 0.05) == proven]
            left.scatter(
                [one for one, _ in own],
                [place for _, place in own],
                facecolors=face,
                edgecolors=ACCURACY,
                s=22,
                zorder=3,
            )
        left.axvline(0, color=MUTED, linewidth=0.8)
        left.set_yticks(places, [f"{row.layer}:{row.expert}  (n={row.support})" for row in rows])
        left.invert_yaxis()
        left.tick_params(axis="y", length=0)
        thick = "95% from other problems" if elsewhere else "95% interval"
        left.set_xlabel(f"{_name(scores)}; thick: {thick}, |: bound for all together")
        left.set_title("best experts (layer:expert; filled: evidence)", loc="left")

        first, second = scores.halves.first, scores.halves.second
        both = np.isfinite(first) & np.isfinite(second)
        right.scatter(first[both], second[both], s=9, color=MUTED, alpha=0.6, linewidths=0)
        best = [(scores.layers.index(row.layer), row.expert) for row in rows]
        best = [at for at in best if both[at]]
        right.scatter([first[at] for at in best], [second[at] for at in best], s=22, color=ACCURACY, linewidths=0)
        if both.any():
            low, high = min(first[both].min(), second[both].min()), max(first[both].max(), second[both].max())
            right.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle="--")
        right.set_xlabel("score from one half of the problems")
        right.set_ylabel("score from the other half")
        right.set_title(f"split halves: Spearman {_number(scores.stability['spearman'])}", loc="left")
        return svg_text(figure)


def _name(scores: ExpertScores) -> str:
    by = str(scores.options["by"])
    return by if scores.method["words"] else "combined score"


def agreement_matrix(
    names: Sequence[str], spearman: Sequence[Sequence[Reach]], overlap: Sequence[Sequence[Reach]], top: int
) -> str:
    """Two matrices: rank correlation, and share of the best ``top`` in common; under each value its 95% interval.

    Tables of [value, low, high] over the names, as `ExpertScores.families` and `expert_stats.rivals.Rankings` hold them.
    ValueError for fewer than two names.
    """
    if len(names) < 2:
        raise ValueError(f"there are {len(names)} rankings: two are needed to agree")
    side = max(2.6, 0.88 * len(names))
    longest = max(map(len, names))
    with mpl.rc_context(STYLE):
        margins = (0.14 * longest + 0.5, 0.09 * longest + 0.6)
        beside = len(names) < 4  # else one above the other, so that the letters stay large enough on a page
        size = (2 * side + margins[0], side + margins[1]) if beside else (side + margins[0], 2 * (side + margins[1]))
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
        _matrix(left, names, spearman, "RdBu_r", (-1.0, 1.0), "{:+.2f}", "rank correlation")
        _matrix(right, names, overlap, "Blues", (0.0, 1.0), "{:.0%}", f"best {top} in common")
        if beside:
            right.set_yticks([])
        return svg_text(figure)


def family_matrix(scores: ExpertScores) -> str:
    """Whether families of problems share experts: `agreement_matrix` of `ExpertScores.families`, of which there must be two."""
    found = scores.families
    return agreement_matrix(found["families"], found["spearman"], found["overlap"], found["top"])


def _matrix(
    axes: Axes,
    names: Sequence[str],
    table: Sequence[Sequence[Reach]],
    colours: str,
    limits: tuple[float, float],
    form: str,
    title: str,
) -> None:
    values = np.array([[np.nan if cell[0] is None else cell[0] for cell in row] for row in table], dtype=float)
    scale = mpl.colormaps[colours].with_extremes(bad="#b8b8b8")
    axes.imshow(np.ma.masked_invalid(values), cmap=scale, vmin=limits[0], vmax=limits[1])
    middle, reach = (limits[0] + limits[1]) / 2, (limits[1] - limits[0]) / 2
    for row, cells in enumerate(table):
        for column, (value, low, high) in enumerate(cells):
            if row == column or value is None:
                continue
            # The colours are dark at both ends of the first scale, and at the upper end of the second.
            dark = abs(value - middle) > 0.6 * reach if limits[0] < 0 else value > 0.55
            ink = "white" if dark else INK
            axes.text(column, row - 0.12, form.format(value), ha="center", va="center", color=ink, fontsize=9)
            if low is not None and high is not None and np.isfinite([low, high]).all():
                ends = f"{form.format(low)} to {form.format(high)}"
                axes.text(column, row + 0.22, ends, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def one_against_another(
    first_C: Array, second_C: Array, names: tuple[str, str], labels: Sequence[str], proven_C: Array, note: str
) -> str:
    """Experts by two scores. ``labels``: of every expert; those at the ends of either score are named. ``proven_C``: experts with
    evidence under the second score, filled. ``note``: the title, for the correlation."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for chosen, face, label in (
            (~proven_C, "none", "without evidence"),
            (proven_C, ACCURACY, "with evidence (q at most 0.05)"),
        ):
            axes.scatter(
                first_C[chosen], second_C[chosen], s=20, facecolors=face, edgecolors=ACCURACY, linewidths=0.9,
                label=label, alpha=0.85,
            )  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        ends = {int(at) for score in (first_C, second_C) for at in (*np.argsort(score)[:2], *np.argsort(score)[-3:])}
        for at in sorted(ends):
            axes.annotate(labels[at], (first_C[at], second_C[at]), (4, 4), textcoords="offset points", fontsize=7.5)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(note, loc="left")
        axes.margins(0.09)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
        return svg_text(figure)


def _number(value: float) -> str:
    """Two decimals, or the word."""
    return f"{value:.2f}" if math.isfinite(value) else "undefined"
