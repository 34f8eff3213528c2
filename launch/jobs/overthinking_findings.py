"""What a finished overthinking job has to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.core.directions import FOLDER, JobDirections, read_made
from launch.core.findings import Findings, silent_arms
from launch.jobs.overthinking_options import OverthinkingOptions
from launch.jobs.overthinking_settings import BASELINE, Choice, Setting
from moe_steer import Direction
from moe_steer.saes import SAEFit, fit_lines
from reasoning_evals import compare_arms
from reasoning_evals.comparing import (
    MARGIN,
    ArmSummary,
    Comparison,
    Efficiency,
    Thoughts,
    Tuning,
    efficiency,
    length_interval,
    rounded,
    thoughts_of,
)
from reasoning_evals.report import ArmPoint, Table, frontier, minus, percent, signed_percent
from reasoning_evals.runs import GradeRow, read_generations


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that the steps made."""

    options: OverthinkingOptions
    choices: Mapping[str, Choice]
    """Method -> what was chosen."""
    settings: Sequence[Setting]
    """All that were tried."""
    tuning: Sequence[GradeRow]
    test: Sequence[GradeRow]
    folder: Path
    left_out: Sequence[str] = ()
    """One sentence for every method that could not take part."""

    @cached_property
    def comparison(self) -> Comparison:
        """The arms of the test."""
        return compare_arms(self.test, tuned=self._tuning_note())

    @cached_property
    def sweep(self) -> Comparison | None:
        """The settings on the tuning problems."""
        return compare_arms(self.tuning) if self.tuning else None

    @cached_property
    def efficiencies(self) -> list[Efficiency]:
        """Every arm against the baseline."""
        return [efficiency(pair) for pair in self.comparison.pairs if pair.a == BASELINE]

    @cached_property
    def thoughts(self) -> dict[str, Thoughts]:
        """Arm -> how its thoughts look."""
        token_ids: dict[str, list[Sequence[int]]] = {}
        for item in read_generations(self.folder / "test"):
            token_ids.setdefault(item.arm, []).append(item.token_ids)
        return {arm.name: thoughts_of(arm, self.test, token_ids[arm.name]) for arm in self.comparison.arms}

    @cached_property
    def directions(self) -> dict[str, Direction]:
        """Method -> the direction that was tested."""
        folder = self.folder / FOLDER
        files = {method: choice.setting.file for method, choice in self.choices.items()}
        return {method: Direction.load(folder / file) for method, file in files.items() if file}

    def _tuning_note(self) -> Tuning | None:
        if not self.tuning or not self.settings:
            return None
        problems = {row.problem_id for row in self.tuning}
        return Tuning(
            num_settings=len(self.settings),
            on=f"{len(problems)} tuning problems",
            num_arms=len({setting.method for setting in self.settings}),
        )

    @cached_property
    def silent(self) -> list[str]:
        """One sentence for every arm that changed nothing."""
        plans = {method: choice.setting.plan(self.folder / FOLDER) for method, choice in self.choices.items()}
        return silent_arms({BASELINE: None, **plans}, BASELINE, self.folder / "test")

    @cached_property
    def made(self) -> JobDirections:
        """The folder of directions."""
        return read_made(self.folder / FOLDER)

    @cached_property
    def sae_fit(self) -> tuple[int, SAEFit] | None:
        """The layer of the SAE and its fit on the texts of the pairs, where a direction that was tested is read by it."""
        tested = any("sae" in direction.header for direction in self.directions.values())
        return next(iter(self.made.fits.items()), None) if tested else None

    def warnings(self) -> list[str]:
        """What a reader has to know before the numbers, one sentence each."""
        poor = self.sae_fit and self.sae_fit[1].warning
        return [*self.made.warnings, *self.silent, *([poor] if poor else [])]

    def results(self) -> dict[str, Any]:
        """The content of results.json: no time, path or machine in it, so that equal seeds give equal bytes."""
        return {
            "sentences": [one.sentence for one in self.efficiencies],
            "verdicts": {one.arm: one.verdict for one in self.efficiencies},
            "thinking_tokens_ratio": {one.arm: dataclasses.asdict(one.tokens) for one in self.efficiencies},
            "thoughts": {arm: dataclasses.asdict(one) for arm, one in self.thoughts.items()},
            "chosen": {
                method: dataclasses.asdict(choice.setting) | {"within_margin": choice.within_margin}
                for method, choice in self.choices.items()
            },
            "left_out": list(self.left_out),
            "sae_fit": self.sae_fit and self.sae_fit[1].to_dict(),
            "directions": {method: direction.header for method, direction in self.directions.items()},
            "tuning": self.sweep.to_dict() if self.sweep else None,
            "comparison": self.comparison.to_dict(),
        }


def findings_of(outcome: Outcome) -> Findings:
    """Lengths against accuracy, what was chosen, what the choice was among."""
    return Findings(
        folder=outcome.folder,
        step="test",
        title=f"Shorter thoughts for {outcome.options.model}: what they cost",
        comparison=outcome.comparison,
        sweep=outcome.sweep,
        results=rounded(outcome.results()),
        summary=summary(outcome),
        facts=facts(outcome),
        warnings=outcome.warnings(),
        silent=outcome.silent,
        then=["moe-steer thinking {folder} --out thinking.json    what the shorter thoughts leave out"],
        headline=[one.sentence for one in outcome.efficiencies],
        tables={"Length and cost": length_table(outcome), "What was chosen": choice_table(outcome)},
        figures=figures(outcome),
    )


def figures(outcome: Outcome) -> dict[str, str]:
    """Title -> SVG."""
    comparison = outcome.comparison
    curves = {arm.name: [_place(arm)] for arm in comparison.arms if arm.name != BASELINE}
    result = {"Accuracy against thinking, test problems": frontier(curves, _place(comparison.arm(BASELINE)))}
    sweep = outcome.sweep
    if sweep is not None and outcome.settings:
        tried: dict[str, list[ArmPoint]] = {}
        for setting in outcome.settings:
            layer = f" L{setting.layer}" if setting.layer is not None else ""
            tried.setdefault(setting.method + layer, []).append(_place(sweep.arm(setting.label)))
        chosen = [choice.setting.label for choice in outcome.choices.values()]
        title = "All settings that were tried, tuning problems (the chosen ones are ringed)"
        result[title] = frontier(tried, _place(sweep.arm(BASELINE)), chosen)
    return result


def _place(arm: ArmSummary) -> ArmPoint:
    tokens = arm.thinking_tokens or arm.total_tokens
    assert tokens is not None
    accuracy = arm.accuracy
    return ArmPoint(arm.name, tokens.mean, tokens.low, tokens.high, accuracy.mean, accuracy.low, accuracy.high)


def facts(outcome: Outcome) -> dict[str, str]:
    """Lines for the head of the report."""
    options = outcome.options
    result = {
        "Model": options.model,
        "Sampling": options.sampling_in_words,
        "Choice": choice_rule(outcome),
        "Strengths": "x0.1: a tenth of the residual stream's mean norm at the layer (L)",
        "Verdicts": (
            f"held: lower end of accuracy, also if few problems lose much, above -{100 * MARGIN:g} points; lost: hurt after Holm; "
            "not settled: neither"
        ),
        "Columns": "loops: end in a loop; repeated: longest stretch that occurs twice, as a share of the answer",
    }
    if outcome.sae_fit:
        result["SAE"] = fit_lines(*outcome.sae_fit)[0]
    unmoved = [one.arm for one in outcome.efficiencies if one.accuracy.low == one.accuracy.high]
    if unmoved:
        result["Read with care"] = (
            f"{', '.join(unmoved)}: every problem was solved as often as by the baseline; an interval of no width does not rule out small losses"
        )
    for number, sentence in enumerate(outcome.left_out, 1):
        result[f"Left out {number}"] = sentence
    return result


def choice_rule(outcome: Outcome) -> str:
    """How settings were chosen, and how fine the tuning answers can tell them apart."""
    margin = outcome.options.margin
    num = sum(row.arm == BASELINE for row in outcome.tuning)
    grain = f" (one answer of {num} is {100 / num:.1f} points)" if num else ""
    points = f"{margin:g} point" + "s" * (margin != 1)
    return f"fewest thinking tokens at a loss of at most {points} in accuracy and in closed thoughts on the tuning problems{grain}"


def length_table(outcome: Outcome) -> Table:
    """Every arm: length, change, accuracy, truncation, repetition, verdict."""
    against = {one.arm: one for one in outcome.efficiencies}
    thoughts = outcome.thoughts

    def change(name: str) -> str:
        tokens = against[name].tokens
        return f"{signed_percent(tokens.ratio)} ({minus(length_interval(tokens))})"

    columns = {
        "arm": lambda arm: arm.name,
        "thinking": lambda arm: f"{thoughts[arm.name].thinking_tokens:.1f}",
        "change (95%)": lambda arm: change(arm.name) if arm.name in against else "–",
        "accuracy": lambda arm: percent(arm.accuracy.mean),
        "closed": lambda arm: percent(thoughts[arm.name].closed),
        "never closed": lambda arm: percent(thoughts[arm.name].truncated),
        "loops": lambda arm: percent(thoughts[arm.name].loops),
        "repeated": lambda arm: percent(thoughts[arm.name].repetition),
        "verdict": lambda arm: against[arm.name].verdict if arm.name in against else "reference",
    }
    return Table.of(outcome.comparison.arms, columns)


def choice_table(outcome: Outcome) -> Table:
    """Every method: its setting, and what the direction is made of."""
    rows = []
    for method, choice in outcome.choices.items():
        setting, direction = choice.setting, outcome.directions.get(method)
        header = direction.header if direction else {}
        cosine = header.get("cosine_with_caa") if "sae" in header else None
        rows.append(
            (
                method,
                setting.label
                if choice.within_margin
                else f"{setting.label} (no setting met the rule; of all, this one is most often right)",
                setting.scope or "–",
                "–" if cosine is None else minus(f"{cosine:.3f}"),
                str(header.get("num_atoms", "–")),
            )
        )
    return Table(head=("method", "setting", "acts at", "cosine with CAA", "atoms"), rows=tuple(rows))


def summary(outcome: Outcome) -> list[str]:
    """Lines for the terminal."""
    lines = []
    for arm in outcome.comparison.arms:
        accuracy, thoughts = arm.accuracy, outcome.thoughts[arm.name]
        lines.append(
            f"{arm.name:15} {thoughts.thinking_tokens:7.1f} thinking tokens  {100 * accuracy.mean:5.1f}% correct "
            f"({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})  {100 * thoughts.truncated:4.1f}% never closed  "
            f"{100 * thoughts.repetition:4.1f}% repeated"
        )
    lines += [one.sentence for one in outcome.efficiencies]
    for method, choice in outcome.choices.items():
        if not choice.within_margin:
            lines.append(
                f"{method}: no setting met the rule on the tuning problems; {choice.setting.label}, most often right of them, was tested"
            )
    return [*lines, *outcome.left_out]
