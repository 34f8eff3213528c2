"""A finished overthinking job, read back from its folder."""

from __future__ import annotations

from pathlib import Path

from launch.overthinking.directions import FOLDER, INDEX, read_index
from launch.overthinking.findings import OverthinkingFindings
from launch.overthinking.options import OverthinkingOptions, methods_of
from launch.overthinking.settings import all_settings, choices_of
from launch.results_file import read_results
from launch.stored_options import options_from, stored_config
from reasoning_evals.runs import grade_run


def findings_of(folder: Path) -> OverthinkingFindings:
    """Grade again, choose again, and collect what the steps left; ValueError when the job is not finished."""
    config = stored_config(folder)
    read_results(folder, "reduce_overthinking.py")
    # The SAE stands there by its sha256: which file it came from is not part of what the run is.
    options = options_from(config, OverthinkingOptions, [])
    methods, left_out = methods_of(options, config["sae"] is not None)
    files = read_index(folder / FOLDER) if (folder / FOLDER / INDEX).is_file() else {}
    unsteered, tuning = (
        grade_run(folder / part) if (folder / part).is_dir() else [] for part in ("identification", "tuning")
    )
    tried = {row.arm for row in tuning}  # another version may try others where nobody asked for some
    settings = [one for one in all_settings(methods, files, unsteered, options) if one.label in tried]
    return OverthinkingFindings(
        options=options,
        choices=choices_of(methods, settings, tuning, options.margin),
        settings=settings,
        tuning=tuning,
        test=grade_run(folder / "test"),
        folder=folder,
        left_out=left_out,
    )
