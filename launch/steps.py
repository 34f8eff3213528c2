"""The steps of the main job. Each is a function of what the steps before it left in the run folder, on every rank alike."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_stats import ExpertScores, RoutingCounts, score_experts, select_experts, select_placebo
from launch.options import Options
from launch.ranks import Ranks
from launch.sharded import collect_over_ranks
from launch.wiring import markers_for, parse_coefficients, traces_of
from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.backends import layout_of, lockstep
from moe_steer.presets import PAPER_GAIN, preset_plan
from reasoning_evals import Problem, run_arms
from reasoning_evals.engines import InProcessSampler, SamplingConfig
from reasoning_evals.runs import Arm, GradeRow, grade_run, read_generations

CALIBRATION = 64
"""Unsteered answers that firing rates are taken from when the plan is given."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every step works with."""

    options: Options
    ranks: Ranks
    model: Any
    tokenizer: Any
    folder: Path

    @property
    def sampling(self) -> SamplingConfig:
        """The decoding rule of all steps."""
        return SamplingConfig(
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            max_new_tokens=self.options.token_limit,
            greedy=self.options.greedy,
            batch_size=self.options.rows,
        )

    def arm(self, name: str, plan: SteeringPlan | None = None) -> Arm:
        """The model under a plan, or as it is."""
        sampler = InProcessSampler(self.model, self.tokenizer)
        if plan is None:
            return Arm(name, sampler, details={"plan": None})
        steered = plan
        return Arm(
            name,
            sampler,
            context=lambda: steer(self.model, steered, tokenizer=self.tokenizer, quiet=True),
            details={"plan": steered.digest()},
        )

    def sample(self, step: str, arms: Sequence[Arm], problems: Sequence[Problem], k: int) -> list[GradeRow]:
        """Sample and grade into the step's folder; the grades, on every rank."""
        folder = self.folder / step
        index, number = layout_of(self.model).share
        with own_folder(folder, self.model, self.ranks) as mine, lockstep(self.model):
            run_arms(
                arms,
                problems,
                mine,
                k,
                self.sampling,
                self.options.seed,
                rank=index,
                world_size=number,
                progress=None if self.ranks.is_main else False,
                task=Path(self.options.problems).stem,
            )
        if not layout_of(self.model).lockstep:
            self.ranks.wait_while_growing(folder)
        self.ranks.barrier()
        return self.ranks.agree(grade_run(folder, problems) if self.ranks.is_main else None)


@contextmanager
def own_folder(folder: Path, model: Any, ranks: Ranks) -> Iterator[Path]:
    """Where this rank writes. Ranks over which one model stretches all make every sample; rank 0 keeps them, the others work on
    a copy of what is there already (they must skip the same samples), thrown away at the end."""
    if layout_of(model).writes and not layout_of(model).same_tokens:
        yield folder
        return
    there = (
        {path.name: path.read_bytes() for path in folder.glob("*.json*")} if ranks.is_main and folder.is_dir() else {}
    )
    there = ranks.agree(there)
    if ranks.is_main:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rank-") as copy:
        for name, content in there.items():
            Path(copy, name).write_bytes(content)
        yield Path(copy)


def find_experts(bench: Bench, step: str) -> ExpertScores:
    """Count the routing of the unsteered answers of a step, and score every expert; counts and scores are left in the folder."""
    options, path = bench.options, bench.folder / "counts.safetensors"
    coefficients = parse_coefficients(options.coefficients)
    if not bench.ranks.agree(path.exists()):
        completions = [item for item in read_generations(bench.folder / step) if item.arm == "baseline"]
        traces = sorted(traces_of(completions, bench.tokenizer), key=lambda trace: trace.trace_id)
        markers = markers_for(bench.tokenizer, options.markers, coefficients)
        counts = collect_over_ranks(bench.model, traces, markers, bench.ranks)
        if bench.ranks.is_main:
            counts.save(path)
        bench.ranks.barrier()
    scores = score_experts(
        RoutingCounts.load(path), coefficients or None, min_support=options.min_support, missing_marker="skip"
    )
    if bench.ranks.is_main:
        scores.save(bench.folder / "scores.json")
    return scores


def given_plan(options: Options) -> SteeringPlan | None:
    """The plan of --plan or --preset."""
    if options.plan:
        plan = SteeringPlan.load(options.plan)
        if plan.is_neutral:
            raise ValueError(
                f"the plan {options.plan!r} is neutral (all gains 1, all strengths 0): there is nothing to compare"
            )
        return plan
    if options.preset:
        return preset_plan(options.preset, options.top, options.gains[0] if len(options.gains) == 1 else PAPER_GAIN)
    return None


def check_has_experts(model: str, num_layers_with_experts: int) -> None:
    """ValueError, with what to do, for a model in which there are no experts to find."""
    if not num_layers_with_experts:
        raise ValueError(
            f"{model} is a dense model and has no experts to find: give --plan with directions ('moe-steer direction', "
            "'moe-steer plan --residual'), or use launch/reduce_overthinking.py"
        )


def with_gain(plan: SteeringPlan, gain: float) -> SteeringPlan:
    """The same experts, all at another gain."""
    return dataclasses.replace(plan, experts=[ExpertGain(entry.layer, entry.expert, gain) for entry in plan.experts])


def candidate_plan(options: Options, scores: ExpertScores) -> SteeringPlan:
    """The top experts of the scores; the gain is still to be chosen."""
    return select_experts(
        scores,
        top=options.top,
        gain=options.gains[0],
        min_support=options.min_support,
        scope=options.scope,
        renormalize=options.renormalize,
    )


def tune_gain(bench: Bench, plan: SteeringPlan, problems: Sequence[Problem]) -> tuple[float, list[GradeRow]]:
    """The gain with the most correct answers on the tuning problems, and the grades of the sweep (baseline included).

    Ties go to the gain nearest to 1: the smallest intervention that does as well.
    """
    options = bench.options
    if len(options.gains) == 1:
        return options.gains[0], []
    arms = [bench.arm("baseline"), *(bench.arm(gain_name(gain), with_gain(plan, gain)) for gain in options.gains)]
    rows = bench.sample("tuning", arms, problems, options.num_samples)
    correct = num_correct(rows)
    return max(options.gains, key=lambda gain: (correct[gain_name(gain)], -distance_from_one(gain))), rows


def gain_name(gain: float) -> str:
    """The name of a tuning arm."""
    return f"gain {gain:g}"


def distance_from_one(gain: float) -> float:
    """How strong a gain is: 4 and 1/4 are equally far from 1, and 0 is farthest."""
    return max(gain, 1 / gain) if gain else float("inf")


def num_correct(rows: Sequence[GradeRow]) -> Mapping[str, int]:
    """Correct answers of each arm."""
    result: dict[str, int] = {}
    for row in rows:
        result[row.arm] = result.get(row.arm, 0) + row.correct
    return result


def placebo_for(scores: ExpertScores, plan: SteeringPlan, seed: int) -> SteeringPlan | None:
    """Random experts of the same layers and about the same firing rate; None for a plan without experts."""
    return select_placebo(scores, plan, seed) if plan.experts else None
