"""The command line of the main job, and the plan that it may give."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from expert_stats import RoutingCounts
from launch.core.option_checks import ReadBy, check_counts
from launch.core.options import SplitOptions
from launch.core.served.server_options import EngineOptions
from launch.core.wiring import load_plan
from moe_steer import PAPER_GAIN, SteeringPlan, preset_plan
from moe_steer.layers import ModelShape
from moe_steer.tokens import parse_scope

_GIVEN = "--{option} is for experts that are searched, and --{options.given} gives them: leave it out"
SEARCH = ReadBy(("search",), _GIVEN)
TOP = ReadBy(("search", "preset"), _GIVEN)
CAUSE = ReadBy(("causes",), "--{option} is for --by causes: give that too, or leave it out")
ONE_GAIN = ReadBy(("gains",), "--gains are {value}: a preset takes one, nothing is tuned")


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions, SplitOptions):
    """Find the experts that think, turn them up, and see whether it helped."""

    model: str = "lab-search"
    """Model folder, GGUF file, hub id, or an embedded model: lab-search, on which more thought pays, lab-plain, on which it never does, or lab-dense."""
    plan: str | None = None
    """Use this plan file instead of finding experts."""
    preset: str | None = None
    """Use published experts, for example rice-r1-math, instead of finding experts."""
    counts: str | None = None
    """Counts of unsteered answers ('moe-steer collect'), in place of sampling and counting them here."""
    by: Annotated[Literal["npmi", "causes"], SEARCH] = "npmi"
    """How experts are chosen: by how they go with the markers (npmi), or by what more gain does to the odds that a thought goes on (causes:
    derivatives, taken where thoughts went on or ended; the model has to be loaded)."""
    tokens: Annotated[tuple[str, ...], CAUSE] = ("Wait", "Alternatively")
    """For --by causes: words with which a thought goes on."""
    wanted: Annotated[Literal["higher", "lower"], CAUSE] = "higher"
    """For --by causes: what the plan is to make of the odds of going on. Gains below 1 are tried on experts that move them the other way."""
    num_identification: Annotated[int | None, SEARCH] = None
    """Problems that experts are found on."""
    num_tuning: Annotated[int | None, SEARCH] = None
    """Problems that the gain is chosen on."""
    num_test: int | None = None
    """Problems of the comparison; default all of a file or task, 240 of the lab."""
    top: Annotated[int, TOP] = 2
    """How many experts to turn up."""
    gains: Annotated[tuple[float, ...], TOP, ONE_GAIN] = (2.0, 4.0, 16.0, 64.0)
    """Gains tried on the tuning problems; one value is used as it is. A preset takes 64, or the one value given here."""
    scope: Annotated[str, SEARCH] = "all"
    """Tokens at which the plan acts (plans and presets keep their own): all, prompt, thought, answer, generated, step_end,
    step_end:CLASS (sentence, line, paragraph, stop) or after:N."""
    renormalize: Annotated[bool, SEARCH] = False
    """Rescale a token's weights to their former sum after the gain."""
    markers: tuple[str, ...] = ("<think>", "</think>", "Alternatively", "Wait")
    """Tags and words whose routing is counted."""
    coefficients: tuple[str, ...] = ()
    """What each marker counts for, as NAME=NUMBER; default <think>=1 </think>=-1 Alternatively=-1, others 0."""
    min_support: int | None = None
    """Least number of joint selections at <think>; default a tenth of the traces."""
    max_q: Annotated[float, SEARCH] = 0.05
    """Evidence that makes an expert cognitive: the largest q. Where too few have it, the job goes on with the best, as unproven."""

    lab_sizes: ClassVar = {"identification": 240, "tuning": 120, "test": 240}
    quick_sizes: ClassVar = {"identification": 48, "tuning": 12, "test": 32}

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_scope(self.scope)
        if self.plan and self.preset:
            raise ValueError("give --plan or --preset, not both")
        if not self.gains:
            raise ValueError("gains is empty: give at least one number")
        if any(not gain >= 0 or gain == 1 for gain in self.gains):
            raise ValueError(f"gains are {list(self.gains)}: give numbers >= 0 other than 1 (1 is the baseline)")
        if len(set(self.gains)) != len(self.gains):
            raise ValueError(f"gains {list(self.gains)} hold a number twice")
        if self.by == "causes" and (self.counts or self.held_by):
            given = "counts" if self.counts else self.held_by
            raise ValueError(
                f"--by causes takes derivatives of answers through the model, which --{given} keeps away: leave one out"
            )
        if not self.tokens:
            raise ValueError("--tokens is empty: give words with which a thought goes on, such as Wait")
        check_counts(self, ("top",))
        if not 0 < self.max_q < 1:
            raise ValueError(f"--max-q is {self.max_q}: give a rate between 0 and 1")

    def readers(self) -> Set[str]:
        one_gain = {"gains"} if not self.preset or len(self.gains) == 1 else set()
        causes = {"causes"} if self.by == "causes" else set()
        return {*super().readers(), self.given or "search", *one_gain, *causes}

    @property
    def given(self) -> str | None:
        """The option that gives the experts; None where they are searched."""
        return "plan" if self.plan else "preset" if self.preset else None

    @property
    def test_only(self) -> bool:
        return self.given is not None


def given_plan(options: Options) -> SteeringPlan | None:
    """The plan of --plan or --preset."""
    if options.plan:
        return load_plan(options.plan)
    if options.preset:
        return preset_plan(options.preset, options.top, options.gains[0] if len(options.gains) == 1 else PAPER_GAIN)
    return None


def inputs_of(options: Options, plan: SteeringPlan | None) -> dict[str, str | None]:
    """What decides the results beside the options: the content of files."""
    counts = {} if options.counts is None else {"given_counts": RoutingCounts.load(options.counts).digest()}
    return {"given_plan": plan.digest() if plan else None, **counts}


def check_kind(options: Options, plan: SteeringPlan | None, shape: ModelShape | None) -> None:
    """ValueError, with what to do, for a plan that does not fit the model, and without a plan for a model in which there are no
    experts to find. ``shape``: None where it is not known yet."""
    if shape is None:
        return
    if plan is not None:
        plan.check(shape)
    elif not shape.moe_layers:
        raise ValueError(
            f"{options.model} is a dense model and has no experts to find: give --plan with directions ('moe-steer direction', "
            "'moe-steer plan --residual'), or use launch/reduce_overthinking.py"
        )
