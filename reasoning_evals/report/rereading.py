"""What a page adds when it is built again: the same samples cut at lower limits, and credit by part."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from reasoning_evals.comparing import at_caps, cap_lines, p_cell, p_text, part_credits, verdict_p
from reasoning_evals.report.build import Report, Table
from reasoning_evals.report.text import percent, points_interval, signed_points
from reasoning_evals.runs import read_grades, run_problems


class Rereading(NamedTuple):
    """What is asked of the samples that are there."""

    caps: tuple[int, ...] = ()
    """Token limits."""
    by_part: bool = False

    def added_to(self, report: Report, folder: Path) -> Report:
        """The report with the tables and sentences. ``folder``: with the graded samples. ValueError for what they cannot answer."""
        for asked, add in ((self.caps, self._capped), (self.by_part, self._by_part)):
            if asked:
                report = add(report, folder)
        return report

    def _capped(self, report: Report, folder: Path) -> Report:
        found = at_caps(read_grades(folder), self.caps, report.comparison.baseline)
        table = Table(
            head=(
                "token limit",
                "pair",
                "finished",
                "points",
                "by finishing",
                "by being right where both finished",
                "p (Holm)",
                "verdict",
            ),
            rows=[
                (
                    f"{one.cap:,}",
                    f"{one.b} − {one.a}",
                    f"{percent(one.finished_b)} against {percent(one.finished_a)}",
                    *(
                        f"{signed_points(part.mean)} ({points_interval(part)})"
                        for part in (one.accuracy, one.by_finishing, one.by_being_right)
                    ),
                    p_cell(one.holm_p),
                    one.verdict + (f": {one.where}" if one.where else ""),
                )
                for one in found
            ],
        )
        return _with(report, "The same samples, cut at each limit", table, cap_lines(found))

    def _by_part(self, report: Report, folder: Path) -> Report:
        found = part_credits(read_grades(folder), run_problems(folder), report.comparison.baseline)
        table = Table(
            head=("pair", "problems", "credit of the first", "credit of the second", "points", "p"),
            rows=[
                (
                    f"{one.b} − {one.a}",
                    f"{one.num_problems}",
                    percent(one.credit_b.mean),
                    percent(one.credit_a.mean),
                    f"{signed_points(one.difference.mean)} ({points_interval(one.difference)})",
                    p_cell(verdict_p(one.difference, None)),
                )
                for one in found
            ],
        )
        lines = [
            f"By part, over the {one.num_problems} problems with several: {one.b} has {percent(one.credit_b.mean)} of the parts "
            f"right, {one.a} {percent(one.credit_a.mean)} ({signed_points(one.difference.mean)} points, "
            f"{points_interval(one.difference)}; {p_text(verdict_p(one.difference, None))}, not adjusted)."
            for one in found
        ]
        return _with(report, "Credit by part", table, lines)


NOTHING_MORE = Rereading()


def _with(report: Report, title: str, table: Table, lines: list[str]) -> Report:
    return dataclasses.replace(report, tables={**report.tables, title: table}, read_again=[*report.read_again, *lines])
