"""A run's report: Markdown, and one HTML file that needs nothing else."""

from reasoning_evals.report.build import Example, ProblemOutcome, Report, Side, build_report
from reasoning_evals.report.markdown import render_markdown
from reasoning_evals.report.page import render_html, write_pages

__all__ = [
    "Example",
    "ProblemOutcome",
    "Report",
    "Side",
    "build_report",
    "render_html",
    "render_markdown",
    "write_pages",
]
