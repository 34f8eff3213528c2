"""``moe-steer report``: a run folder -> report.md and report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Grade a run again and build its pages again: report.md and report.html, without a model."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a job (main job, evaluate, overthinking, safety), or of any run with generations."""
    title: str | None = None
    """Title of the page, for a run that is not of a job."""

    def run(self) -> int:
        """Write the pages."""
        from launch.rebuild import rebuild
        from reasoning_evals.grading_pass import grade_run
        from reasoning_evals.report import build_report, write_pages

        folder = Path(self.folder)
        summary = rebuild(folder)
        if summary is not None:
            print(summary.lstrip())
            return 0
        grade_run(folder)
        write_pages(build_report(folder, title=self.title), folder)
        print(f"report: {folder / 'report.html'}")
        return 0
