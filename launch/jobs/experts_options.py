"""The command line of the main job."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, ClassVar

from launch.core.option_checks import ReadBy, check_counts
from launch.core.options import SplitOptions
from launch.core.served.server_options import EngineOptions
from moe_steer.tokens import parse_scope

_GIVEN = "--{option} is for experts that are searched, and --{options.given} gives them: leave it out"
SEARCH = ReadBy(("search",), _GIVEN)
TOP = ReadBy(("search", "preset"), _GIVEN)
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
    quick_sizes: ClassVar = {"identification": 72, "tuning": 24, "test": 48}

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
        check_counts(self, ("top",))
        if not 0 < self.max_q < 1:
            raise ValueError(f"--max-q is {self.max_q}: give a rate between 0 and 1")

    def readers(self) -> Set[str]:
        one_gain = {"gains"} if not self.preset or len(self.gains) == 1 else set()
        return {*super().readers(), self.given or "search", *one_gain}

    @property
    def given(self) -> str | None:
        """The option that gives the experts; None where they are searched."""
        return "plan" if self.plan else "preset" if self.preset else None

    @property
    def test_only(self) -> bool:
        return self.given is not None
