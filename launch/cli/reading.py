"""``moe-steer export``: a graded run in the formats that other tools read.

``moe-steer report``: a run folder -> report.md and report.html. ``moe-steer inspect``: where chosen experts fire, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Grade a run again and build its pages again: report.md and report.html, without a model."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a job (main job, evaluate, overthinking, safety), or of any run with generations."""
    title: str | None = None
    """Title of the page, for a run that is not of a job."""
    caps: tuple[int, ...] = ()
    """Token limits, such as 1024 4096 16384: the page also compares the same samples cut at each."""
    by_part: bool = False
    """Of problems with several parts (answer type list), also compare the share of parts that are right."""

    def run(self) -> int:
        """Write the pages."""
        from launch.jobs import rebuild
        from reasoning_evals.report import Rereading, build_report, write_pages
        from reasoning_evals.runs import grade_run

        folder = Path(self.folder)
        asked = Rereading(self.caps, self.by_part)
        summary = rebuild(folder, asked)
        if summary is not None:
            print(summary.lstrip())
            return 0
        grade_run(folder)
        write_pages(asked.added_to(build_report(folder, title=self.title), folder), folder)
        print(f"report: {folder / 'report.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look at answers of a run token by token: where chosen experts fire, how strongly, at which marks; a table here, and a page.

    What the main job left is shown at once. --again, or another run of a mixture-of-experts model, loads the model and runs the
    answers through it once more, each steered as its arm was.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of the main job, or of any run with generations."""
    again: bool = False
    """Record the traces again, though the folder has some."""
    num: int = 6
    """Problems whose first answers are recorded, in every arm."""
    each: bool = False
    """A line for each trace, instead of one for each arm."""
    experts: tuple[str, ...] = ()
    """Experts to record, as LAYER:EXPERT; default those of the plans and the best of the scores."""
    model: str | None = None
    """Model to load; default the one that the run names."""
    backend: str = "auto"
    """How the model is held; see moe_steer.load_model."""

    def run(self) -> int:
        """Print the table, and say where the page is."""
        from launch.core.option_checks import check_counts
        from launch.core.trace_views import inspect_run
        from reasoning_evals.report import TRACES_PAGE, VIEWS_FILE, TraceViews

        check_counts(self, ("num",))
        folder = Path(self.folder)
        asked = self.again or self.experts or self.model is not None
        if asked or not (folder / VIEWS_FILE).is_file():
            views = inspect_run(folder, self.num, self.experts, self.model, self.backend)
            views.save(folder)
        else:
            views = TraceViews.load(folder)
        print(views.table(self.each))
        print(f"page: {folder / TRACES_PAGE}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's samples and scores for other tools: lm-evaluation-harness files, parquet, or Inspect logs."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run."""
    out: str
    """Folder to write to, a subfolder or file for each arm; with parquet, the file."""
    format: Literal["lm-eval", "parquet", "inspect"] = "parquet"
    """lm-eval (samples and results), parquet (a row a sample), inspect (needs the package inspect-ai)."""
    private: bool = False
    """Also write questions whose authors ask not to publish them; the export then stays with you."""

    def run(self) -> int:
        """Grade, write, and say what was written."""
        from reasoning_evals.exports import export_inspect, export_lm_eval, export_parquet

        if self.format == "parquet":
            paths = [export_parquet(self.folder, self.out, private=self.private)]
        elif self.format == "lm-eval":
            paths = export_lm_eval(self.folder, self.out, private=self.private)
        else:
            paths = export_inspect(self.folder, self.out, private=self.private)
        for path in paths:
            print(f"wrote {path}")
        return 0
