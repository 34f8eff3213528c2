"""Report -> one HTML page. Model output is escaped; the page has no script and loads nothing.

``write_pages`` writes a report into its folder: report.md and report.html. ``write_plain_page`` does so with notes, tables and figures
that are no comparison of arms.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from moe_steer.files import write_whole
from reasoning_evals.comparing import detectable_text, p_cell, t_text
from reasoning_evals.report import charts
from reasoning_evals.report import text as form
from reasoning_evals.report.build import TRACES_PAGE, Report, Table
from reasoning_evals.report.markdown import inline, render_markdown, table_text


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainPage:
    """Everything that is rendered."""

    title: str
    notes: Sequence[str]
    tables: Mapping[str, Table]
    figures: Mapping[str, str]
    """Title -> SVG text."""


def write_pages(report: Report, folder: Path) -> None:
    """Write both pages, each completely or not at all. They name the page of traces, where the folder has one."""
    if (folder / TRACES_PAGE).is_file():
        report = dataclasses.replace(report, traces_page=TRACES_PAGE)
    write_whole(folder / "report.md", render_markdown(report))
    write_whole(folder / "report.html", render_html(report))


def render_html(report: Report) -> str:
    """A page for any browser: it sends no request, and model output in it cannot run."""
    comparison = report.comparison
    ends = [end for arm in comparison.arms for end in (arm.accuracy.low, arm.accuracy.high)]
    low, high = charts.padded(min(ends), max(ends), 0.05, 0.02)
    dumbbells = charts.dumbbells(report)
    return template("report.html.jinja").render(
        report=report,
        comparison=comparison,
        domains=sorted({name for arm in comparison.arms for name in arm.domains}),
        style=Markup(template_text("style.css")),
        colour=lambda name: charts.arm_class(report, name),
        mini=lambda arm: Markup(
            charts.interval_bar(
                arm.accuracy.low, arm.accuracy.mean, arm.accuracy.high, (low, high), charts.arm_class(report, arm.name)
            )
        ),
        plots={
            "scatter": _mark(charts.accuracy_against_tokens(report)),
            "forest": _mark(charts.difference_forest(report)),
            "sorted": _mark(charts.sorted_differences(report)),
            "dumbbells": _mark(dumbbells[0]) if dumbbells else None,
            "lengths": _mark(charts.length_distributions(report)),
        },
        dumbbells_left_out=dumbbells[1] if dumbbells else 0,
        audit={"columns": report.audit_columns(), "rows": report.audit_rows()},
        figures={title: _image(svg) for title, svg in report.figures.items()},
        config=json.dumps(report.run, indent=2, sort_keys=True, ensure_ascii=False),
    )


def write_plain_page(page: PlainPage, folder: Path, stem: str) -> None:
    """``stem``.md and ``stem``.html, each completely or not at all; the Markdown has no figures."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {inline(page.title)}", "\n".join(f"- {inline(note)}" for note in page.notes)]
    for title, table in page.tables.items():
        cells = [[*map(inline, row)] for row in table.rows]
        parts += [f"## {inline(title)}", table_text([*map(inline, table.head)], cells)]
    write_whole(folder / f"{stem}.md", "\n\n".join(parts) + "\n")
    html: str = template("plain.html.jinja").render(
        page=page,
        style=Markup(template_text("style.css")),
        figures={title: _image(svg) for title, svg in page.figures.items()},
    )
    write_whole(folder / f"{stem}.html", html)


def _mark(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)


def _image(svg: str) -> str:
    """An SVG of the caller as an image: its ids cannot clash with others, and no script in it can run."""
    return "data:image/svg+xml;base64," + base64.b64encode(form.visible(svg).encode()).decode()


_LEFTWARDS = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+(?:\s+[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+)*")


def _apart(text: object) -> Markup:
    """A sentence in which words that are read from right to left, as an arm's name may be, leave numbers beside them in their place."""
    return Markup(_LEFTWARDS.sub(r"<bdi>\g<0></bdi>", str(escape(form.visible(text)))))


def template_text(name: str) -> str:
    """A file of the folder ``templates``."""
    return resources.files("reasoning_evals.report").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def template(name: str) -> Any:
    """A page's template: what it shows is escaped, and what it names must be given."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=form.percent,
        percent_interval=form.percent_interval,
        count=form.count,
        count_interval=form.count_interval,
        signed_points=form.signed_points,
        points_interval=form.points_interval,
        signed_count=form.signed_count,
        signed_interval=form.signed_interval,
        detectable_text=detectable_text,
        length_change=form.length_change,
        p_cell=p_cell,
        t_text=t_text,
        visible=form.visible,
        apart=_apart,
        thousands="{:,}".format,
        outcome=lambda name: form.OUTCOMES.get(name, name),
    )
    return environment.from_string(template_text(name))
