"""The pages of a finished job of several steps, written again from its folder, without a model."""

from __future__ import annotations

from pathlib import Path

from expert_stats import ExpertScores
from launch.findings import Findings
from launch.options import Options
from launch.results_file import RESULTS_FILE, read_results
from launch.stored_options import options_from, stored_config
from moe_steer import SteeringPlan
from reasoning_evals.runs import GradeRow, grade_run, read_run

# An option that no other job has.
_MAIN, _OVERTHINKING, _SAFETY = "gains", "decision_strengths", "attack_tokens"


def rebuild(folder: Path) -> str | None:
    """Grade again, write results.json and the pages; returns the summary, or None for a folder of anything else.

    ValueError for a folder without run.json, and for a job that is not finished.
    """
    config = stored_config(folder)
    if _MAIN in config:
        from launch.publish import publish

        return publish(findings_of(folder))
    if _OVERTHINKING in config:
        from launch.overthinking import findings as overthinking
        from launch.overthinking.rebuild import findings_of as overthinking_findings

        return overthinking.publish(overthinking_findings(folder))
    if _SAFETY in config:
        from launch.safety_experiment import report as safety
        from launch.safety_experiment.rebuild import findings_of as safety_findings

        return safety.publish(safety_findings(folder))
    return _rebuild_evaluation(folder)


def _rebuild_evaluation(folder: Path) -> str | None:
    """The pages of a finished launch/evaluate.py; None for another folder."""
    from launch import evaluate

    stored = read_run(folder).get(evaluate.OPTIONS)
    if not (folder / RESULTS_FILE).is_file():
        return None
    results = read_results(folder, "evaluate.py")
    if stored is None and not {"baseline", "arms", "sentences", "comparison"} <= results.keys():
        return None
    if stored is None:
        raise ValueError(
            f"{folder} does not say which options it was made with, an older launch/evaluate.py made it: "
            "start that again with the same options, it samples nothing twice and writes the pages"
        )
    options = options_from(stored, evaluate.EvaluateOptions, [])
    return evaluate.publish(options, grade_run(folder), results["warnings"], folder)


def findings_of(folder: Path) -> Findings:
    """What the steps of a main job left; ValueError when it is not finished."""
    options = options_from(stored_config(folder), Options, ["given_plan"])
    if not (folder / "plan.json").is_file():
        raise ValueError(f"{folder} holds an unfinished job: start launch/steer_r1.py again, it continues where it was")
    placebo = folder / "placebo.json"
    scores = folder / "scores.json"
    tuning: list[GradeRow] = grade_run(folder / "tuning") if (folder / "tuning").is_dir() else []
    return Findings(
        options=options,
        plan=SteeringPlan.load(folder / "plan.json"),
        placebo=SteeringPlan.load(placebo) if placebo.is_file() else None,
        scores=ExpertScores.load(scores) if scores.is_file() else None,
        tuning=tuning,
        test=grade_run(folder / "test"),
        folder=folder,
    )
