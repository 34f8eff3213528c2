"""Loops in the answers of a run, the plans that might end them, and what a plan that ends them costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from expert_stats.causes import Causes, find_causes, loop_odds
from launch.core.session import arm_here
from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.tokens import Trace
from reasoning_evals import Problem, loop_at_end, run_arms
from reasoning_evals.comparing import cluster_names, paired_difference, proportion_estimate, wilson_interval
from reasoning_evals.engines import SamplingConfig
from reasoning_evals.runs import GradeRow, grade_run, read_generations

BASELINE, UNLOOPED = "baseline", "unlooped"
MODES = ("greedy", "sampled")
Key = tuple[str, str, str, int]
"""Mode, arm, problem, sample."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """How answers are made: greedily, one a problem, and sampled, several, both up to a cap."""

    model: Any
    tokenizer: Any
    sampled: SamplingConfig
    samples: int
    seed: int

    def answers(self, folder: Path, problems: Sequence[Problem], plans: Mapping[str, SteeringPlan | None]) -> Answers:
        """Of all arms (name -> plan) in both ways; what is in the folder already is kept."""
        loops: dict[Key, bool] = {}
        rows: dict[str, list[GradeRow]] = {}
        for mode in MODES:
            config = self.sampled if mode == "sampled" else dataclasses.replace(self.sampled, greedy=True)
            arms = [arm_here(name, self.model, self.tokenizer, plan) for name, plan in plans.items()]
            k = self.samples if mode == "sampled" else 1
            run_arms(arms, problems, folder / mode, k, config, self.seed, task="unloop")
            rows[mode] = grade_run(folder / mode, problems)
            for item in read_generations(folder / mode):
                loops[mode, item.arm, item.problem_id, item.sample_idx] = is_loop(item.token_ids, item.finish_reason)
        return Answers(folder=folder, loops=loops, rows=rows)


class Share(NamedTuple):
    """How many of how many answers loop, with the 95% interval of the share over problems (``proportion_estimate``)."""

    number: int
    of: int
    low: float
    high: float

    @property
    def words(self) -> str:
        """In words."""
        share = 100 * self.number / max(1, self.of)
        return f"{self.number} of {self.of} ({share:.1f}%, {100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one folder."""

    folder: Path
    loops: Mapping[Key, bool]
    rows: Mapping[str, Sequence[GradeRow]]

    def share(self, arm: str, mode: str) -> Share:
        """Of one arm made in one way."""
        found: dict[str, list[bool]] = {}
        for (way, name, problem, _), loops in self.loops.items():
            if (way, name) == (mode, arm):
                found.setdefault(problem, []).append(loops)
        number, of = (sum(map(count, found.values())) for count in (sum, len))
        clusters = self._clusters(found)
        if len(set(clusters or found)) < 2:
            return Share(number, of, *(wilson_interval(number, of) if of == 1 else (0.0, 1.0)))
        one = proportion_estimate([fmean(own) for own in found.values()], clusters)
        return Share(number, of, one.low, one.high)

    def _clusters(self, problems: Iterable[str]) -> list[str] | None:
        cluster_of = {row.problem_id: row.cluster_id for rows in self.rows.values() for row in rows}
        return cluster_names({problem: cluster_of.get(problem) for problem in problems})

    def looping(self, arm: str) -> set[str]:
        """The problems with an answer that loops."""
        return {problem for (_, name, problem, _), loops in self.loops.items() if name == arm and loops}

    def difference(self, of: str) -> dict[str, Any]:
        """``UNLOOPED`` less ``BASELINE``, paired by problem over all answers in both ways: of "loops" their share, of "accuracy" the share
        of right answers; mean, 95% interval (None where all problems moved alike), p value, ``loss_bound``, number of problems."""
        found: dict[str, dict[str, list[float]]] = {BASELINE: {}, UNLOOPED: {}}
        if of == "loops":
            for (_, arm, problem, _), loops in self.loops.items():
                found[arm].setdefault(problem, []).append(loops)
        else:
            for row in (row for rows in self.rows.values() for row in rows):
                found[row.arm].setdefault(row.problem_id, []).append(row.correct)
        problems = sorted(found[BASELINE])
        before, after = ([sum(found[arm][p]) / len(found[arm][p]) for p in problems] for arm in (BASELINE, UNLOOPED))
        one = paired_difference(before, after, self._clusters(problems), limit=1.0)
        numbers = {key: getattr(one, key) for key in ("mean", "low", "high", "p_value", "loss_bound", "num_problems")}
        # All moved alike: a width of 0 is no certainty.
        return numbers if one.se > 0 else numbers | {"low": None, "high": None}


def fewer_loops(change: dict[str, Any]) -> bool:
    """Whether an end of loops is shown: by the interval, or, where all problems moved alike, by the test of their signs. A plan that does
    nothing passes in 0% to 3% of simulated runs of 4 to 60 problems."""
    return change["high"] < 0 if change["high"] is not None else change["mean"] < 0 and change["p_value"] < 0.05


def is_loop(token_ids: Sequence[int], finish_reason: str) -> bool:
    """An answer that the cap cut while it repeated the same tokens: three copies or more, 30 tokens or more."""
    return finish_reason == "length" and loop_at_end(token_ids).period > 0


def causes_of_loops(model: Any, traces: Iterable[Trace], each: int, most: int, watch: Any) -> Causes:
    """What silencing each expert does to the log-odds that loops go on, the lowering ones as a coalition. ``traces``: those that end
    in a loop. ValueError for fewer than two problems that loop."""
    traces = list(traces)
    loops = {trace.trace_id: loop_at_end(trace.token_ids[trace.prompt_length :]) for trace in traces}
    return find_causes(
        model,
        loop_odds(traces, loops),
        outcome={"kind": "loop", "words": "log-odds that a loop goes on", "places": sum(loop.length for loop in loops.values())},
        wanted="lower",
        each=each,
        gains=(0.0,),
        routers=("free",),
        coalition=most,
        watch=watch,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoopText:
    """A sequence that ends in a loop."""

    token_ids: tuple[int, ...]
    period: int
    length: int

    @classmethod
    def of(cls, trace: Trace) -> LoopText:
        """The loop with which a trace ends."""
        loop = loop_at_end(trace.token_ids[trace.prompt_length :])
        return cls(token_ids=tuple(trace.token_ids), period=loop.period, length=loop.length)


def weakest_odds(model: Any, loops: Sequence[LoopText], plan: SteeringPlan) -> float:
    """How hard the loops are to leave: the log-odds, in nats, that the token of a round before comes again, at the phase of the period
    where they are lowest; mean over rounds, then over loops.

    A loop goes on for as long as its weakest link holds. The mean over all its tokens hides that link: within a repeated sentence the next
    word is as good as certain whatever is silenced.
    """
    found = []
    for loop in loops:
        size = len(loop.token_ids)
        at = range(size - loop.length + loop.period - 1, size - 1)
        ids_1S = torch.tensor([loop.token_ids], device=model.device)
        with torch.no_grad(), steer(model, plan, quiet=True):
            logits_TV = model(ids_1S, use_cache=False).logits[0, at.start : at.stop].double()
        next_T = ids_1S[0, at.start + 1 : at.stop + 1]
        log_p_T = logits_TV.log_softmax(-1).gather(-1, next_T[:, None])[:, 0]
        others_TV = logits_TV.scatter(-1, next_T[:, None], -math.inf)
        odds_T = log_p_T - (others_TV.logsumexp(-1) - logits_TV.logsumexp(-1))
        phases = [odds_T[phase :: loop.period].mean() for phase in range(min(loop.period, len(odds_T)))]
        found.append(float(torch.stack(phases).min()))
    return sum(found) / len(found)


def screened_plans(
    model: Any, loops: Sequence[LoopText], causes: Causes, most: int, screen: int, watch: Any
) -> tuple[dict[str, SteeringPlan], list[tuple[str, float]]]:
    """Name -> plan: experts silenced one by one, the ``most`` that leave the loops easiest to leave (``weakest_odds``), and the coalition that
    grows from the best of them while the odds fall. And (name, odds) of all that were tried, the baseline's first.

    Tried are the ``screen`` experts with the largest derivatives, of either sign: where an expert is so strong that its effect is
    saturated, its derivative is small and may have the wrong sign.
    """
    order = sorted(causes.ranking(), key=lambda row: -abs(row.gradient))[:screen]
    before = weakest_odds(model, loops, SteeringPlan())
    odds: dict[tuple[tuple[int, int], ...], float] = {}
    for row in watch("experts silenced", order):
        one = ((row.layer, row.expert),)
        odds[one] = weakest_odds(model, loops, silencing(one))
    best = sorted((experts for experts in odds if odds[experts] < before), key=lambda experts: odds[experts])[:most]
    sets = dict.fromkeys(best)
    taken: tuple[tuple[int, int], ...] = best[0] if best else ()
    reached = odds[taken] if taken else before
    while taken and len(taken) < most:
        grown = {tuple(sorted((*taken, *one))): one for one in best if one[0] not in taken}
        tried = {experts: weakest_odds(model, loops, silencing(experts)) for experts in grown}
        if not tried or min(tried.values()) >= reached:
            break
        taken = min(tried, key=lambda experts: tried[experts])
        reached = odds[taken] = tried[taken]
        sets[taken] = None
    said = [
        (BASELINE, before),
        *sorted(((name_of(experts), one) for experts, one in odds.items()), key=lambda one: one[1]),
    ]
    return {name_of(experts): silencing(experts) for experts in sets}, said


def candidate_plans(causes: Causes, most: int) -> dict[str, SteeringPlan]:
    """Name -> plan: the expert whose silencing lowers the mean odds most, and the coalition as it grew."""
    lowering = sorted((one for one in causes.effects if one.effect < 0), key=lambda one: one.effect)[:1]
    sets = dict.fromkeys(tuple(sorted(one.experts)) for one in (*lowering, *causes.coalition[-most:]))
    return {name_of(experts): silencing(experts) for experts in sets}


def silencing(experts: Iterable[tuple[int, int]]) -> SteeringPlan:
    """A plan in which these experts, (layer, expert), have the gain 0."""
    return SteeringPlan(experts=[ExpertGain(layer, expert, 0.0) for layer, expert in experts])


def name_of(experts: Iterable[tuple[int, int]]) -> str:
    """``3:5+2:7``."""
    return "+".join(f"{layer}:{expert}" for layer, expert in experts)


def choose_plan(answers: Answers, plans: Mapping[str, SteeringPlan]) -> tuple[str | None, dict[str, int]]:
    """The plan under which fewest answers loop, of equal ones that of fewest experts; None where none loops less often than the
    baseline. And the number of loops of each, the baseline's among them."""
    left = {name: sum(answers.share(name, mode).number for mode in MODES) for name in (BASELINE, *plans)}
    best = min(plans, key=lambda name: (left[name], len(plans[name].experts)), default=None)
    return (best if best is not None and left[best] < left[BASELINE] else None), left
