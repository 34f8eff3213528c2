"""The settings that the overthinking job tries, and the choice among them. Plain values; only ``build`` touches a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.core.directions import FOLDER
from launch.core.levers.arm_building import arm_of
from launch.core.options import BASELINE
from launch.core.session import Session
from launch.jobs.overthinking_options import OverthinkingOptions
from moe_steer import ResidualVector, SteeringPlan
from reasoning_evals.prompts import prompt_with_request
from reasoning_evals.runs import Arm, GradeRow

UNTUNED = ("concise-prompt", "nowait")
"""Methods without a setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to make thoughts shorter."""

    method: str
    label: str
    """Its name among the settings that are tried."""
    layer: int | None = None
    strength: float | None = None
    """Share of the residual stream's mean norm."""
    scope: str | None = None
    file: str | None = None
    """Of the direction, in the run's folder of directions."""
    budget: int | None = None

    def plan(self, folder: Path) -> SteeringPlan | None:
        """The steering plan of a direction; None for prompts and decoding rules."""
        if self.file is None:
            return None
        assert self.layer is not None
        assert self.strength is not None
        assert self.scope is not None
        vector = ResidualVector(
            layer=self.layer, file=self.file, strength=self.strength, scope=self.scope, unit="residual_norm"
        )
        return SteeringPlan(residual=[vector], base_dir=str(folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What became of one method on the tuning problems."""

    setting: Setting
    within_margin: bool
    """Whether the setting met the rule of ``choose``; else it is the one that is most often right."""


def direction_settings(files: Mapping[str, Sequence[tuple[int, str]]], options: OverthinkingOptions) -> list[Setting]:
    """Every layer and strength of every direction: ``files`` is method -> (layer, file name)."""
    settings = []
    for method, entries in files.items():
        decision = method == "decision"
        strengths = options.tried_decision_strengths if decision else options.tried_strengths
        scope = options.stop_scope if decision else options.pair_scope
        settings += [
            Setting(
                method=method,
                label=f"{method} L{layer} x{strength:g}",
                layer=layer,
                strength=strength,
                scope=scope,
                file=file,
            )
            for layer, file in entries
            for strength in strengths
        ]
    return settings


def budget_settings(thinking_tokens: Sequence[int], shares: Sequence[float]) -> list[Setting]:
    """Thinking budgets at quantiles of the unsteered lengths, longest first; equal ones once. ValueError without lengths."""
    if not thinking_tokens:
        raise ValueError("no unsteered answer with a thought is right, so no budget can be read off: leave budget out")
    ordered = sorted(thinking_tokens)
    budgets = sorted(
        {max(1, ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in shares}, reverse=True
    )
    return [Setting(method="budget", label=f"budget:{number}", budget=number) for number in budgets]


def all_settings(
    methods: Sequence[str],
    files: Mapping[str, Sequence[tuple[int, str]]],
    unsteered: Sequence[GradeRow],
    options: OverthinkingOptions,
) -> list[Setting]:
    """All that is tried. ``files``: method -> (layer, file name); ``unsteered``: graded answers that budgets are read off."""
    settings = direction_settings(files, options)
    if "budget" in methods:
        lengths = [row.thinking_tokens for row in unsteered if row.correct and row.thinking_tokens is not None]
        settings += budget_settings(lengths, options.tried_budgets)
    return settings


def choices_of(
    methods: Sequence[str], settings: Sequence[Setting], tuning: Sequence[GradeRow], margin: float
) -> dict[str, Choice]:
    """For every method what is tested: the choice among its settings, or itself where it has nothing to tune."""
    untuned = [Setting(method=method, label=method) for method in methods if method in UNTUNED]
    choices = choose([*settings, *untuned], tuning, margin)
    return {method: choices[method] for method in methods}


def build(setting: Setting, name: str, session: Session, options: OverthinkingOptions) -> Arm:
    """The arm of a setting, under a name."""
    plan = setting.plan(session.folder / FOLDER)
    if plan is not None:
        return session.arm(name, plan)
    if setting.method == "concise-prompt":
        render = prompt_with_request(session.tokenizer, options.brevity_request)
        details = {"plan": None, "request": options.brevity_request}
        return dataclasses.replace(session.arm(name), details=details, render=render)
    word = f"budget:{setting.budget}" if setting.method == "budget" else setting.method
    return dataclasses.replace(arm_of(session, word).arm, name=name)


def choose(settings: Sequence[Setting], rows: Sequence[GradeRow], margin: float) -> dict[str, Choice]:
    """For each method the setting with the fewest thinking tokens among those that lose at most ``margin`` points of accuracy
    on these graded samples and cut off no more thoughts than the baseline does plus the margin; where none does, the one that loses least.

    A method with one setting has nothing to choose: it is kept.
    """
    outcomes = {arm: _outcome([row for row in rows if row.arm == arm]) for arm in {row.arm for row in rows}}
    result: dict[str, Choice] = {}
    for method in dict.fromkeys(setting.method for setting in settings):
        own = [setting for setting in settings if setting.method == method]
        if len(own) == 1 and own[0].label not in outcomes:
            result[method] = Choice(setting=own[0], within_margin=True)
            continue
        base = outcomes[BASELINE]
        kept = [
            setting
            for setting in own
            if outcomes[setting.label].accuracy >= base.accuracy - margin / 100 - 1e-12
            and outcomes[setting.label].truncated <= base.truncated + margin / 100 + 1e-12
        ]
        best = (
            min(kept, key=lambda setting: outcomes[setting.label].tokens)
            if kept
            else max(own, key=lambda setting: (outcomes[setting.label].accuracy, -outcomes[setting.label].tokens))
        )
        result[method] = Choice(setting=best, within_margin=bool(kept))
    return result


@dataclass(frozen=True, slots=True)
class _Outcome:
    accuracy: float
    truncated: float
    tokens: float


def _outcome(rows: Sequence[GradeRow]) -> _Outcome:
    num = len(rows)
    lengths = [row.total_tokens if row.thinking_tokens is None else row.thinking_tokens for row in rows]
    return _Outcome(
        sum(row.correct for row in rows) / num,
        sum(row.outcome in ("truncated", "unclosed") for row in rows) / num,
        sum(lengths) / num,
    )
