"""``moe-steer unloop``: a model that falls into loops -> the few experts whose silencing ends them, as a plan that bakes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from launch.core.option_checks import check_counts, check_folder
from launch.core.options import HeldModel
from launch.core.prompt_options import PromptOptions
from moe_steer.files import write_whole
from moe_steer.lab import is_made_up

if TYPE_CHECKING:
    from launch.core.levers.looping import Answers, Making
    from moe_steer import SteeringPlan

PLAN, RESULTS = "plan.json", "results.json"


@dataclass(frozen=True, kw_only=True)
class Unloop(PromptOptions, HeldModel):
    """Find loops, find the few experts that carry them, and write a plan that silences these, with what it costs elsewhere.

    Half of the problems are searched: answers are made greedily and sampled up to a cap, and of those that end in a loop the derivative of
    the odds that it goes on is taken in every expert's gain; the best experts are silenced, alone and together, and the answers made
    again. The other half, and other tasks, show what the chosen plan does to loops and to right answers. Stopped and started again, it
    continues.
    """

    model: Annotated[str, tyro.conf.Positional] = "lab"
    """Model folder, hub id, or 'lab' for the embedded model."""
    out: str
    """Folder to write to: plan.json, results.json and the runs."""
    problems: str = "lab"
    """A JSONL file of problems, or the name of a task, on which the model falls into loops."""
    others: tuple[str, ...] = ()
    """Other files or tasks on which nothing may be lost."""
    num: int = 120
    """Problems of each, the first so many."""
    samples: int = 2
    """Sampled answers a problem, beside a greedy one."""
    temperature: float = 0.6
    """Of the sampled answers."""
    top_p: float = 0.95
    """Of the sampled answers."""
    max_new_tokens: int = 1024
    """The cap: longest answer in tokens. An answer that it cuts while it repeats itself is a loop."""
    each: int = 5
    """Experts of each sign that are silenced to see what that does."""
    most: int = 3
    """Most experts of a plan."""
    screen: int = 512
    """Experts that are silenced one by one in the loops that were found: those with the largest derivatives."""
    screen_loops: int = 4
    """Loops in which they are."""
    margin: float = 5.0
    """Points of accuracy: a larger loss has to be ruled out by the interval, else a warning says that it is not."""
    batch_size: int = 64
    """Answers made together."""
    seed: int = 0
    """Decides the lab's problems and all samples."""

    def run(self) -> int:
        """Search, choose, check, write."""
        check_counts(self, ("num", "samples", "max_new_tokens", "each", "most", "screen", "screen_loops", "batch_size"))
        check_folder(self.out)
        if self.num < 8:
            raise ValueError(
                f"--num is {self.num}: give at least 8 problems, half of them are searched and half are held out"
            )
        from launch.core.levers.looping import Making, fewer_loops
        from launch.core.ranks import refuse_several_ranks
        from launch.core.session import load_asked
        from moe_steer.layers import model_shape
        from reasoning_evals.engines import SamplingConfig

        refuse_several_ranks("moe-steer unloop", "one process")
        problems = self._load(self.problems)
        others = {Path(name).stem: self._load(name) for name in self.others}
        model, tokenizer = load_asked(self, batch=self.batch_size, context=None)
        if not model_shape(model).num_experts:
            raise ValueError(f"{self.model} has no experts to silence: loops of dense models are not looked into")
        sampling = SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        making = Making(model=model, tokenizer=tokenizer, sampled=sampling, samples=self.samples, seed=self.seed)
        name, plan, search = self._search(making, problems[::2])
        results: dict[str, Any] = {"version": 1, "search": search}
        checked = {"held out": problems[1::2], **others}
        results["checks"] = {}
        for where, some in checked.items():
            folder = Path(self.out, where.replace(" ", "_"))
            results["checks"][where] = self._check(
                where, making.answers(folder, some, {"baseline": None, "unlooped": plan})
            )
        self._write(plan, name, results)
        if not fewer_loops(results["checks"]["held out"]["change_of_loops"]):
            raise ValueError(
                "on the problems that did not choose it no end of loops is shown (the change may be 0): do not use this plan; give "
                "more problems with --num, or the loops are carried by no few experts"
            )
        return 0

    def _load(self, name: str) -> list[Any]:
        from reasoning_evals import load_task

        lab: dict[str, Any] = {"split": "test", "num": self.num, "seed": self.seed} if is_made_up(name) else {}
        found = load_task(name, **lab)[: self.num]
        if len(found) < 8:
            raise ValueError(f"{name!r} holds {len(found)} problems: give at least 8")
        if len({problem.cluster_id or problem.problem_id for problem in found[1::2]}) < 2:
            raise ValueError(
                f"the held out problems of {name!r} lie in one cluster, which says nothing of others: give more"
            )
        return found

    def _search(self, making: Making, problems: list[Any]) -> tuple[str, SteeringPlan, dict[str, Any]]:
        """The plan that leaves fewest loops on the problems that loop, and the numbers of the search."""
        from launch.cli.causes import summary_of
        from launch.core.levers.looping import (
            BASELINE,
            MODES,
            LoopText,
            candidate_plans,
            causes_of_loops,
            choose_plan,
            screened_plans,
        )
        from launch.core.wiring import read_any_traces
        from moe_steer.console import tracked

        folder = Path(self.out)
        found = making.answers(folder / "search", problems, {BASELINE: None})
        for mode in MODES:
            print(f"{mode}: {found.share(BASELINE, mode).words} answers loop at {self.max_new_tokens} tokens")
        looping = found.looping(BASELINE)
        if len(looping) < 2:
            raise ValueError(
                f"{len(looping)} of {len(problems)} problems end in a loop, and two are needed to look for a cause: nothing to end here; raise "
                "--max-new-tokens, or give --problems on which the model loops"
            )
        loops = {
            f"{arm}/unloop/{problem}#{sample}": mode for (mode, arm, problem, sample), one in found.loops.items() if one
        }
        traces = [
            trace
            for mode in MODES
            for trace in read_any_traces([str(folder / "search" / mode)], making.tokenizer, BASELINE)
            if loops.get(trace.trace_id) == mode
        ]
        causes = causes_of_loops(making.model, traces, self.each, self.most, lambda label, items: tracked(items, label))
        causes.save(str(folder / "causes.json"))
        print(summary_of(causes))
        by_problem = {trace.trace_id.rpartition("#")[0]: LoopText.of(trace) for trace in traces}
        loops_read = list(by_problem.values())[: self.screen_loops]
        plans, odds = screened_plans(
            making.model, loops_read, causes, self.most, self.screen, lambda label, items: tracked(items, label)
        )
        print(
            f"odds of going on at the weakest place of {len(loops_read)} loops: {odds[0][1]:+.2f} nats; with one silenced or more:"
        )
        print("\n".join(f"  {name} {one:+.2f}" for name, one in odds[1:7]))
        plans |= candidate_plans(causes, self.most)
        some = [problem for problem in problems if problem.problem_id in looping]
        chosen, left = choose_plan(making.answers(folder / "candidates", some, {BASELINE: None, **plans}), plans)
        for name, number in left.items():
            print(
                f"  {number:4d} loops on these {len(some)} problems with {'nothing' if name == BASELINE else name} silenced"
            )
        if chosen is None:
            raise ValueError(
                f"silencing none of {len(plans)} sets of experts ends a loop: no plan is written; raise --each or --most, or look at causes.json"
            )
        numbers: dict[str, Any] = {mode: found.share(BASELINE, mode)._asdict() for mode in MODES}
        return chosen, plans[chosen], {"loops": numbers, "problems": len(problems), "candidates": left, "odds": odds}

    def _check(self, where: str, answers: Answers) -> dict[str, Any]:
        """What the plan does on problems that did not choose it."""
        from launch.core.levers.looping import BASELINE, MODES, UNLOOPED

        loops, accuracy = answers.difference("loops"), answers.difference("accuracy")
        shares = {arm: {mode: answers.share(arm, mode) for mode in MODES} for arm in (BASELINE, UNLOOPED)}
        before, after = (
            "; ".join(f"{mode} {shares[arm][mode].words}" for mode in MODES) for arm in (BASELINE, UNLOOPED)
        )
        print(f"{where}: loops {before}; with the plan {after}")
        print(
            f"  change of the share of loops {_points(loops)}, of right answers {_points(accuracy)}, over {loops['num_problems']} problems"
        )
        if accuracy["loss_bound"] < -self.margin / 100:
            print(f"WARNING: {where}: a loss of more than {self.margin:g} points of accuracy is not ruled out")
        said = {arm: {mode: one._asdict() for mode, one in modes.items()} for arm, modes in shares.items()}
        return {"loops": said, "change_of_loops": loops, "change_of_accuracy": accuracy}

    def _write(self, plan: SteeringPlan, name: str, results: dict[str, Any]) -> None:

        about = {"unloop": {"silenced": name, **results["checks"]["held out"]}}
        path = Path(self.out, PLAN)
        dataclasses.replace(plan, provenance=about).save(path)
        results["silenced"] = name
        write_whole(Path(self.out, RESULTS), json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n")
        print(f"wrote {path}; next: moe-steer bake --model {self.model} --plan {path} --out BAKED")


def _points(one: dict[str, Any]) -> str:
    from reasoning_evals.comparing import NO_INTERVAL

    reach = NO_INTERVAL if one["low"] is None else f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}"
    return f"{100 * one['mean']:+.1f} points ({reach})"
