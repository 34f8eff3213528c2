"""The charts of the report: Report -> SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reasoning_evals.report.build import Report
from reasoning_evals.report.svg import Scale, bar, bottom_axis, dot, drawing, left_axis, line, padded, path, text
from reasoning_evals.report.text import count, percent, signed_points, visible

WIDE, HALF = 960, 480  # about the size on the page, so that letters are not scaled
MAX_DUMBBELLS = 40
_NUM_COLOURS = 6


def arm_class(report: Report, name: str) -> str:
    """The CSS class of an arm's colour: arm0 is the baseline."""
    names = [arm.name for arm in report.comparison.arms]
    ordered = [report.comparison.baseline, *[other for other in names if other != report.comparison.baseline]]
    return f"arm{ordered.index(name) % _NUM_COLOURS}" if name in ordered else "arm0"


def accuracy_against_tokens(report: Report) -> str | None:
    """Each arm as a cross of two intervals; None when tokens were not measured."""
    arms = [(arm, arm.thinking_tokens or arm.total_tokens) for arm in report.comparison.arms]
    measured = [(arm, tokens) for arm, tokens in arms if tokens is not None]
    if not measured:
        return None
    height, left, right, top, bottom = 330, 40, HALF - 12, 40, 272
    x = Scale(*padded(min(t.low for _, t in measured), max(t.high for _, t in measured), 0.15, 1.0), left, right)
    ends = [end for arm, _ in measured for end in (arm.accuracy.low, arm.accuracy.high)]
    y = Scale(*padded(100 * min(ends), 100 * max(ends), 0.1, 1.0), bottom, top)
    kind = "Thinking tokens" if measured[0][0].thinking_tokens is not None else "Tokens"
    parts = bottom_axis(x, top, bottom, f"{kind} per answer", "{:,g}")
    parts += left_axis(y, left, right, "Accuracy, %")
    for arm, tokens in measured:
        colour = arm_class(report, arm.name)
        cx, cy = x(tokens.mean), y(100 * arm.accuracy.mean)
        tip = f"{arm.name}: {percent(arm.accuracy.mean)} at {count(tokens.mean)} tokens"
        parts += [
            line(x(tokens.low), cy, x(tokens.high), cy, f"whisker {colour}"),
            line(cx, y(100 * arm.accuracy.low), cx, y(100 * arm.accuracy.high), f"whisker {colour}"),
            dot(cx, cy, 6, f"mark {colour}", tip),
        ]
    # Labels are drawn last, next to their marks.
    ordered = sorted(measured, key=lambda pair: -pair[0].accuracy.mean)
    names = _short([arm.name for arm, _ in ordered], 24)
    marks = [(x(tokens.mean), y(100 * arm.accuracy.mean)) for arm, tokens in ordered]
    for (arm, _), name, place in zip(ordered, names, _beside(marks, names, (left, right)), strict=True):
        if place:
            parts.append(text(place[0], place[1], name, f"name {arm_class(report, arm.name)}", place[2]))
    return drawing(HALF, height, "Accuracy against thinking tokens by arm, with 95% intervals", parts)


def _beside(
    marks: Sequence[tuple[float, float]], names: Sequence[str], frame: tuple[float, float]
) -> list[tuple[float, float, str] | None]:
    """(x, y, anchor) of a label for each mark: near it, inside the frame, and not over other marks and labels; None where there is
    no such place."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    places: list[tuple[float, float, str] | None] = []
    for (x, y), name in zip(marks, names, strict=True):
        width = 8.5 * len(name)
        choices = [(side, y + shift) for shift in (-11, 21, -27, 37, -43, 53) for side in (1, -1)]

        def box(choice: tuple[int, float], x: float = x, width: float = width) -> tuple[float, float, float, float]:
            start = x + 10 if choice[0] > 0 else x - 10 - width
            return start, choice[1] - 13, start + width, choice[1] + 4

        inside = [choice for choice in choices if frame[0] <= box(choice)[0] and box(choice)[2] <= frame[1]] or choices
        free = [choice for choice in inside if not any(_overlap(box(choice), other) for other in taken)]
        if not free:
            places.append(None)
            continue
        side, label_y = free[0]
        taken.append(box(free[0]))
        places.append((x + 10 * side, label_y, "start" if side > 0 else "end"))
    return places


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def difference_forest(report: Report) -> str | None:
    """Paired differences in accuracy with intervals around a zero line; None when nothing was compared."""
    pairs = report.comparison.pairs
    if not pairs:
        return None
    left, right, top, step = 232, WIDE - 110, 16, 34
    bottom = top + step * len(pairs)
    ends = [0.0, *(100 * end for pair in pairs for end in (pair.accuracy.low, pair.accuracy.high))]
    x = Scale(*padded(min(ends), max(ends), 0.08, 1.0), left, right)
    parts = bottom_axis(x, top, bottom, "Difference in accuracy, points", "{:+g}")
    parts.append(line(x(0), top - 6, x(0), bottom, "zero"))
    names = zip(_short([pair.b for pair in pairs], 15), _short([pair.a for pair in pairs], 15), strict=True)
    for index, (pair, (b, a)) in enumerate(zip(pairs, names, strict=True)):
        y = top + step * (index + 0.5)
        found = pair.accuracy
        colour = {"helped": "good", "hurt": "bad"}.get(pair.verdict, "plain")
        parts += [
            text(left - 14, y + 4, f"{b} − {a}", "row-name", "end").replace(
                " − ", "&#8206; − &#8206;"
            ),  # also where both read leftwards
            line(x(100 * found.low), y, x(100 * found.high), y, f"whisker {colour}"),
            dot(x(100 * found.mean), y, 6, f"mark {colour}", pair.sentence),
            text(right + 14, y + 4, signed_points(found.mean), "value", "start"),
        ]
    return drawing(WIDE, bottom + 48, "Paired differences in accuracy with 95% intervals", parts)


def sorted_differences(report: Report) -> str | None:
    """Every problem's change, first pair, from most lost to most gained."""
    pair = _first_pair(report)
    if pair is None:
        return None
    before, after = (report.problems[name] for name in pair)
    changes = sorted((b.accuracy - a.accuracy, b.problem_id) for a, b in zip(before, after, strict=True))
    left, right, top, bottom = 52, WIDE - 12, 40, 200
    limit = max(0.25, *(abs(change) for change, _ in changes))
    y = Scale(-100 * limit, 100 * limit, bottom, top)
    slot = (right - left) / len(changes)
    parts = left_axis(y, left, right, "Change in accuracy, points", "{:+g}")
    for index, (change, name) in enumerate(changes):
        if change:
            x = left + index * slot
            y_top, y_bottom = sorted((y(0), y(100 * change)))
            tip = f"{visible(name)}: {signed_points(change)} points"
            gap = min(1.0, slot * 0.15)
            parts.append(
                bar(x, y_top, max(0.4, slot - gap), y_bottom - y_top, "fill good" if change > 0 else "fill bad", tip)
            )
    parts.append(line(left, y(0), right, y(0), "zero"))
    lost, gained = sum(c < 0 for c, _ in changes), sum(c > 0 for c, _ in changes)
    same = len(changes) - lost - gained
    parts += [
        text(left, bottom + 22, f"{lost} solved less often", "caption", "start"),
        text((left + right) / 2, bottom + 22, f"{same} unchanged", "caption"),
        text(right, bottom + 22, f"{gained} solved more often", "caption", "end"),
    ]
    return drawing(WIDE, bottom + 34, f"Change in accuracy of each of {len(changes)} problems", parts)


def dumbbells(report: Report) -> tuple[str, int] | None:
    """(chart, number of omitted problems): problems that changed, accuracy before and after, first pair."""
    pair = _first_pair(report)
    if pair is None:
        return None
    before, after = (report.problems[name] for name in pair)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a.accuracy != b.accuracy]
    changed.sort(key=lambda both: (-abs(both[1].accuracy - both[0].accuracy), both[0].problem_id))
    shown = sorted(changed[:MAX_DUMBBELLS], key=lambda both: (both[0].accuracy - both[1].accuracy, both[0].problem_id))
    if not shown:
        return None
    left, right, top, step = 232, WIDE - 30, 12, 20
    bottom = top + step * len(shown)
    x = Scale(0, 100, left, right)
    parts = bottom_axis(x, top, bottom, "Accuracy, %")
    names = _short([a.problem_id for a, _ in shown], 25)
    for index, (a, b) in enumerate(shown):
        y = top + step * (index + 0.5)
        kind = "good" if b.accuracy > a.accuracy else "bad"
        parts += [
            text(left - 14, y + 4, names[index], "row-name", "end"),
            line(x(100 * a.accuracy), y, x(100 * b.accuracy), y, f"bridge {kind}"),
            dot(x(100 * a.accuracy), y, 4.5, f"mark {arm_class(report, pair[0])}", f"{pair[0]}: {percent(a.accuracy)}"),
            dot(x(100 * b.accuracy), y, 4.5, f"mark {arm_class(report, pair[1])}", f"{pair[1]}: {percent(b.accuracy)}"),
        ]
    return drawing(WIDE, bottom + 46, "Accuracy of changed problems before and after", parts), len(changed) - len(shown)


def length_distributions(report: Report) -> str | None:
    """One histogram per arm on a common scale, with the median marked."""
    arms = [(name, values) for name, values in report.lengths.items() if values]
    everything = sorted(value for _, values in arms for value in values)
    if not everything:
        return None
    left, right, top, step = 140, HALF - 12, 4, 84
    bottom = top + step * len(arms)
    # The longest 0.5% would compress the rest: they are counted in the last bin.
    limit = max(1, everything[min(len(everything) - 1, int(0.995 * len(everything)))])
    width = math.ceil(
        (limit + 1) / 40
    )  # whole tokens: else some bins would hold more numbers than others, and some none
    num_bins = limit // width + 1
    x = Scale(0, num_bins * width, left, right)
    kind = "Thinking tokens" if report.lengths_are_thoughts else "Tokens"
    parts = bottom_axis(x, top, bottom, f"{kind} per answer", "{:,g}")
    names = _short([name for name, _ in arms], 16)
    for index, ((name, values), short) in enumerate(zip(arms, names, strict=True)):
        base = top + step * (index + 1) - 4
        counts = [0] * num_bins
        for value in values:
            counts[min(num_bins - 1, value // width)] += 1
        colour = arm_class(report, name)
        tall = Scale(0, max(counts), base, base - step + 16)
        points: list[tuple[float, float]] = [(x.start, base)]
        for b, number in enumerate(counts):
            points += [(x(b * width), tall(number)), (x((b + 1) * width), tall(number))]
        points.append((x.end, base))
        median = sorted(values)[len(values) // 2]
        parts += [
            path(points, f"area {colour}"),
            line(x(min(median, limit) + 0.5), base, x(min(median, limit) + 0.5), base - step + 14, f"median {colour}"),
            text(left - 14, base - 24, short, "row-name", "end"),
            text(left - 14, base - 8, f"median {count(median).removesuffix('.0')}", "label", "end"),
        ]
    return drawing(HALF, bottom + 46, "Distribution of thinking length by arm", parts)


def _first_pair(report: Report) -> tuple[str, str] | None:
    pairs = report.comparison.pairs
    return (pairs[0].a, pairs[0].b) if pairs else None


def _short(names: Sequence[str], length: int) -> list[str]:
    """Names of at most so many characters: long ones lose as late a part as leaves different names different.

    >>> _short(["baseline", "plans/layer-1-gain-2", "plans/layer-1-gain-4"], 12)
    ['baseline', 'plans/laye…2', 'plans/laye…4']
    """
    shown = [visible(name) for name in names]
    found = shown
    for kept in range(length - 1, -1, -1):  # characters of the beginning; the others are of the end
        rest = length - 1 - kept
        found = [one if len(one) <= length else f"{one[:kept]}…{one[len(one) - rest :]}" for one in shown]
        if len(set(found)) == len(set(shown)):
            return found
    return [one if len(one) <= length else f"{one[: length - 1]}…" for one in shown]


def interval_bar(low: float, mean: float, high: float, scale_ends: Sequence[float], colour: str) -> str:
    """A tiny interval for a table cell that says it in numbers, too, on a common scale."""
    width, height = 120, 16
    x = Scale(scale_ends[0], scale_ends[1], 4, width - 4)
    parts = [
        line(4, 8, width - 4, 8, "grid"),
        line(x(low), 8, x(high), 8, f"whisker {colour}"),
        dot(x(mean), 8, 4, f"mark {colour}"),
    ]
    return drawing(width, height, "", parts)
