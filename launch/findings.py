"""What a finished main job has to say, as plain values: the content of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_stats import ExpertScores
from launch.firing import nothing_fired
from launch.options import Options
from launch.results_file import write_results
from launch.rounding import rounded
from launch.steps import gain_name, num_correct
from moe_steer import SteeringPlan
from reasoning_evals import compare_arms
from reasoning_evals.comparing import Comparison, Tuning
from reasoning_evals.runs import GradeRow, read_audit

_BEST = 10
NO_PLACEBO = (
    "the plan has directions alone, so there is no placebo arm: a placebo is random experts that fire as often as the plan's, "
    "and this plan names none; whether a random direction would do as much is not tested"
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that the steps made."""

    options: Options
    plan: SteeringPlan
    placebo: SteeringPlan | None
    scores: ExpertScores | None
    tuning: Sequence[GradeRow]
    test: Sequence[GradeRow]
    folder: Path

    @property
    def comparison(self) -> Comparison:
        """The arms of the test."""
        return compare_arms(self.test, tuned=self._tuning_note())

    @property
    def sweep(self) -> Comparison | None:
        """The arms of the gain sweep, or None when nothing was tuned."""
        return compare_arms(self.tuning) if self.tuning else None

    @property
    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """Arm -> what fired in the test."""
        return read_audit(self.folder / "test")

    def silent_arms(self) -> list[str]:
        """One sentence for every steered arm in which nothing fired."""
        found = []
        for name, plan in (("steered", self.plan), ("placebo", self.placebo)):
            problem = nothing_fired(plan, self.firing.get(name, [])) if plan else None
            if problem:
                found.append(f"{name}: {problem}")
        return found

    def warnings(self) -> list[str]:
        """What a reader must know beside the comparison: arms in which nothing fired, a placebo that is not there."""
        return [*self.silent_arms(), *([] if self.plan.experts else [NO_PLACEBO])]

    def results(self) -> dict[str, Any]:
        """The content of results.json: no time, path or machine in it, so that equal seeds give equal bytes."""
        comparison = self.comparison
        pair = comparison.pair("baseline", "steered")
        sweep = self.sweep
        return {
            "version": 1,
            "verdict": pair.verdict,
            "sentence": pair.sentence,
            "against_placebo": comparison.pair("placebo", "steered").sentence if self.placebo else None,
            "warnings": self.warnings(),
            "plan": _without_provenance(self.plan),
            "placebo": _without_provenance(self.placebo) if self.placebo else None,
            "tuning": {
                "gains": list(self.options.gains),
                "correct": dict(num_correct(self.tuning)),
                "chosen": self.plan.experts[0].gain if self.plan.experts else None,
                "comparison": sweep.to_dict(),
            }
            if sweep
            else None,
            "scores": self._scores(),
            "firing": rounded(self.firing),
            "comparison": comparison.to_dict(),
        }

    def write(self) -> None:
        """results.json, plan.json and placebo.json in the folder."""
        self.plan.save(self.folder / "plan.json")
        if self.placebo:
            self.placebo.save(self.folder / "placebo.json")
        write_results(self.folder, self.results())

    def _tuning_note(self) -> Tuning | None:
        if not self.tuning:
            return None
        num = len({row.problem_id for row in self.tuning})
        return Tuning(num_settings=len(self.options.gains), on=f"{num} tuning problems")

    def _scores(self) -> dict[str, Any] | None:
        if self.scores is None:
            return None
        return rounded(
            {
                "markers": dict(zip(self.scores.marker_names, self.scores.occurrences, strict=True)),
                "coefficients": dict(zip(self.scores.marker_names, self.scores.coefficients, strict=True)),
                "num_traces": self.scores.num_traces,
                "num_tokens": self.scores.num_tokens,
                "best": [row._asdict() for row in self.scores.ranking()[:_BEST]],
                "stability": self.scores.stability,
            }
        )


def sweep_points(findings: Findings) -> list[tuple[float, str]]:
    """(gain, arm) of the sweep, the baseline as gain 1, in order of gain."""
    return sorted([(1.0, "baseline"), *((gain, gain_name(gain)) for gain in findings.options.gains)])


def _without_provenance(plan: SteeringPlan) -> dict[str, Any]:
    return {key: value for key, value in plan.to_dict().items() if key not in ("provenance", "model")}
