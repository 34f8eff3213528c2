"""A report into its folder: report.md and report.html."""

from __future__ import annotations

from pathlib import Path

from reasoning_evals.report.content import Report
from reasoning_evals.report.markdown import render_markdown
from reasoning_evals.report.page import render_html
from reasoning_evals.whole_files import write_whole


def write_pages(report: Report, folder: Path) -> None:
    """Both pages, each whole or not at all."""
    write_whole(folder / "report.md", render_markdown(report))
    write_whole(folder / "report.html", render_html(report))
