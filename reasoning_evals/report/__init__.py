"""A run's report: Markdown, and one HTML file that needs nothing else."""

from reasoning_evals.report.build import build_report
from reasoning_evals.report.content import Example, ProblemOutcome, Report, Side
from reasoning_evals.report.markdown import render_markdown
from reasoning_evals.report.page import render_html
from reasoning_evals.report.pages import write_pages

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
