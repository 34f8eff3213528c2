"""``moe-steer export``: a graded run in the formats that other tools read.

``moe-steer report``: a run folder -> report.md and report.html.
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

    def run(self) -> int:
        """Write the pages."""
        from launch.jobs import rebuild
        from reasoning_evals.report import build_report, with_caps, write_pages
        from reasoning_evals.runs import grade_run

        folder = Path(self.folder)
        summary = rebuild(folder, self.caps)
        if summary is not None:
            print(summary.lstrip())
            return 0
        rows = grade_run(folder)
        write_pages(with_caps(build_report(folder, title=self.title), rows, self.caps), folder)
        print(f"report: {folder / 'report.html'}")
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
