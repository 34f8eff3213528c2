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
    """Folder of the main job, or of any run with generations."""
    title: str | None = None
    """Title of the page, for a run that is not of the main job."""

    def run(self) -> int:
        """Write the pages."""
        from launch.publish import publish
        from launch.rebuild import findings_of, is_main_job
        from reasoning_evals.grading_pass import grade_run
        from reasoning_evals.report import build_report, render_html, render_markdown
        from reasoning_evals.run_folder import write_whole

        folder = Path(self.folder)
        if is_main_job(folder):
            _refuse_other_job(folder)
            print(publish(findings_of(folder)).lstrip())
            return 0
        grade_run(folder)
        report = build_report(folder, title=self.title)
        write_whole(folder / "report.md", render_markdown(report))
        write_whole(folder / "report.html", render_html(report))
        print(f"report: {folder / 'report.html'}")
        return 0


def _refuse_other_job(folder: Path) -> None:
    """ValueError for the folder of a job in several steps that is not launch/steer_r1.py."""
    import dataclasses

    from launch.options import Options
    from reasoning_evals.run_folder import read_run

    known = {field.name for field in dataclasses.fields(Options)} | {"given_plan"}
    if set(read_run(folder)["config"]) - known:
        raise ValueError(
            f"{folder} is not a folder of launch/steer_r1.py: start its own job again (launch/reduce_overthinking.py) with the same options and --out, it samples nothing and writes the pages again"
        )
