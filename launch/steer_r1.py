"""The main job: find the experts that think, turn them up, and see whether it helped.

    deepspeed launch/steer_r1.py                                  the embedded model, no argument needed
    deepspeed --num_accelerators 2 launch/steer_r1.py             two processes share the work
    deepspeed launch/steer_r1.py --model PATH_OR_HUB_ID --preset rice-r1-math --problems problems.jsonl
    deepspeed launch/steer_r1.py ... --dry-run                    everything but loading weights

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.options import Options
from launch.ranks import Ranks, leave
from launch.shared_options import load_asked
from launch.start import start


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    return start(Options, run, argv, "steer_r1.py", __doc__)


def run(options: Options, ranks: Ranks) -> None:
    """The whole job, step by step, in the folder of the options."""
    from expert_stats import ExpertScores
    from launch import dry_run, steps
    from launch.findings import Findings
    from launch.problem_sets import problem_sets
    from launch.publish import publish
    from launch.sharded import agree_on_plan, record_start
    from moe_steer.layers import model_shape
    from reasoning_evals.runs import GradeRow, open_run

    if options.dry_run:
        ranks.say(dry_run.report(options, ranks) if ranks.is_main else "")
        return
    plan = steps.given_plan(options)
    sets = problem_sets(options)
    model, tokenizer = load_asked(options)
    if plan is not None:
        plan.check(model)
    else:
        steps.check_has_experts(options.model, len(model_shape(model).moe_layers))
    folder = Path(options.folder)
    config = options.config() | {"given_plan": plan.digest() if plan else None}
    if ranks.is_main:
        open_run(folder, config)
        record_start(folder, model, ranks)
    ranks.barrier()
    bench = steps.Bench(options=options, ranks=ranks, model=model, tokenizer=tokenizer, folder=folder)
    k = options.num_samples
    tuning: list[GradeRow] = []
    scores: ExpertScores | None = None
    last = "4/4"
    if plan is None:
        ranks.say(f"1/4  {len(sets.identification)} identification problems: unsteered answers")
        bench.sample("identification", [bench.arm("baseline")], sets.identification, 1)
        ranks.say("2/4  counting routing at the markers, scoring experts")
        found = scores = steps.find_experts(bench, "identification")
        candidate = steps.candidate_plan(options, found)
        gains = ", ".join(f"{gain:g}" for gain in options.gains)
        ranks.say(f"3/4  {len(sets.tuning)} tuning problems: choosing the gain among {gains}")
        gain, tuning = steps.tune_gain(bench, candidate, sets.tuning)
        plan = steps.with_gain(candidate, gain)
    elif plan.experts:
        calibration = sets.test[: steps.CALIBRATION]
        ranks.say(f"1/4  {len(calibration)} unsteered answers, for the firing rates that the placebo must match")
        bench.sample("calibration", [bench.arm("baseline")], calibration, 1)
        ranks.say("2/4  counting routing at the markers")
        scores = steps.find_experts(bench, "calibration")
        ranks.say("3/4  nothing to choose: the plan is given")
    else:
        last = "1/1"
    plan = agree_on_plan(plan, ranks)
    placebo = steps.placebo_for(scores, plan, options.seed) if scores else None
    arms = [bench.arm("baseline"), bench.arm("steered", plan), *([bench.arm("placebo", placebo)] if placebo else [])]
    names = ", ".join(arm.name for arm in arms)
    ranks.say(f"{last}  {len(sets.test)} test problems x {k} samples in {len(arms)} arms: {names}")
    test = bench.sample("test", arms, sets.test, k)
    findings = Findings(
        options=options, plan=plan, placebo=placebo, scores=scores, tuning=tuning, test=test, folder=folder
    )
    if ranks.is_main:
        print(publish(findings))
    if options.strict and findings.silent_arms():
        raise RuntimeError("; ".join(findings.silent_arms()))


if __name__ == "__main__":
    leave(main())
