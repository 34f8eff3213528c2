"""The main job: find the experts that think, turn them up, compare with the baseline and a placebo.

Each step is a function of what the steps before it left in the run folder, on every rank alike.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from expert_stats import ExpertScores, RoutingCounts, Unproven, score_experts, select_experts, select_placebo
from launch.core.beforehand import look, settle
from launch.core.findings import Findings
from launch.core.options import options_from
from launch.core.problem_sets import ProblemSets, problem_sets
from launch.core.ranks import Ranks
from launch.core.session import Session
from launch.core.trace_views import experts_to_show, first_answers, views_of
from launch.core.wiring import (
    broadcast_plan,
    collect_over_ranks,
    count_served,
    markers_for,
    parse_coefficients,
    references_for,
    traces_of,
)
from launch.jobs.experts_findings import Outcome, evidence_of, findings_of, gain_name, num_correct
from launch.jobs.experts_options import Options, check_kind, given_plan, inputs_of
from moe_steer import SteeringPlan
from moe_steer.backends import layout_of, lockstep
from reasoning_evals import Problem
from reasoning_evals.report import VIEWS_FILE
from reasoning_evals.runs import GradeRow, grade_run, read_generations, read_run

NAME = "steer_r1"
COUNTS, FRESH_COUNTS = "counts.safetensors", "fresh_counts.safetensors"
"""Of the answers that choose experts; of those that measure the chosen."""
TRACES = 6
"""Test problems whose first answers can be read token by token."""
CALIBRATION = 64
"""Unsteered answers that firing rates are taken from when the plan is given."""


def run(options: Options, ranks: Ranks) -> None:
    """The whole job, step by step, in the folder of the options."""
    plan = given_plan(options)
    sets = problem_sets(options)
    known = look(options, quiet=not ranks.is_main)
    check_kind(options, plan, known.shape)
    options, room = settle(options, known, known.longest_prompt(questions_of(sets)), ranks)
    session = Session.load(options, ranks, room, known.tokenizer, known.shape)
    check_kind(options, plan, session.shape)
    session.require({"steered": plan})
    session.open(NAME, options.config() | inputs_of(options, plan))
    k = options.num_samples
    tuning: list[GradeRow] = []
    scores: ExpertScores | None = None
    last = "4/4"
    if plan is None:
        unsteered_answers(
            session, options, "identification", sets.identification, "identification problems: unsteered answers"
        )
        ranks.say("2/4  counting routing at the markers, scoring experts")
        scores = find_experts(session, options, "identification")
        candidate = candidate_plan(options, scores)
        ranks.say(f"     {evidence_of(candidate, scores, options)}")
        if session.connection is not None:  # a placebo of every gain is drawn for a server alone
            session.require(needed_plans(options, candidate, scores))
        gains = ", ".join(f"{gain:g}" for gain in options.gains)
        ranks.say(f"3/4  {len(sets.tuning)} tuning problems: choosing the gain among {gains}")
        gain, tuning = tune_gain(session, options, candidate, sets.tuning)
        plan = with_gain(candidate, gain)
    elif plan.experts:
        calibration = sets.test[:CALIBRATION]
        why = "unsteered answers, for the firing rates that the placebo must match"
        unsteered_answers(session, options, "calibration", calibration, why)
        ranks.say("2/4  counting routing at the markers")
        scores = find_experts(session, options, "calibration")
        ranks.say("3/4  nothing to choose: the plan is given")
    else:
        last = "1/1"
    plan = broadcast_plan(plan, ranks)
    placebo = select_placebo(scores, plan, options.seed) if scores and plan.experts else None
    arms = {"baseline": None, "steered": plan, **({"placebo": placebo} if placebo else {})}
    session.require(arms)
    ranks.say(f"{last}  {len(sets.test)} test problems x {k} samples in {len(arms)} arms: {', '.join(arms)}")
    test = sample(session, "test", arms, sets.test, k)
    if scores and not options.given:
        scores = measure_afresh(session, options, scores)
    keep_traces(session, options, arms, scores)
    findings = None
    if ranks.is_main:
        plan.save(session.folder / "plan.json")
        if placebo:
            placebo.save(session.folder / "placebo.json")
        findings = findings_of(
            Outcome(
                options=options,
                plan=plan,
                placebo=placebo,
                scores=scores,
                tuning=tuning,
                test=test,
                folder=session.folder,
            )
        )
    session.finish(findings)


def read(folder: Path) -> Findings:
    """What the steps of a finished job left; ValueError when it is not finished."""
    options = options_from(read_run(folder)["config"], Options, ["given_plan", "given_counts"])
    if not (folder / "plan.json").is_file():
        raise ValueError(f"{folder} holds an unfinished job: start launch/steer_r1.py again, it continues where it was")
    placebo, scores = folder / "placebo.json", folder / "scores.json"
    return findings_of(
        Outcome(
            options=options,
            plan=SteeringPlan.load(folder / "plan.json"),
            placebo=SteeringPlan.load(placebo) if placebo.is_file() else None,
            scores=ExpertScores.load(scores) if scores.is_file() else None,
            tuning=grade_run(folder / "tuning") if (folder / "tuning").is_dir() else [],
            test=grade_run(folder / "test"),
            folder=folder,
        )
    )


def unsteered_answers(session: Session, options: Options, step: str, problems: Sequence[Problem], what: str) -> None:
    """The answers whose routing is counted, where the counts are not given."""
    if options.counts is not None:
        session.ranks.say(f"1/4  nothing to sample: the counts of {options.counts} are given")
        return
    session.ranks.say(f"1/4  {len(problems)} {what}")
    sample(session, step, {"baseline": None}, problems, 1)


def needed_plans(options: Options, candidate: SteeringPlan, scores: ExpertScores) -> dict[str, SteeringPlan]:
    """Every plan that may be an arm of the tuning or of the test: a server takes them when it starts."""
    plans = {gain_name(gain): with_gain(candidate, gain) for gain in options.gains}
    placebos = {name: select_placebo(scores, plan, options.seed) for name, plan in plans.items()}
    return plans | {f"placebo {name}": plan for name, plan in placebos.items()}


def sample(
    session: Session, step: str, plans: dict[str, SteeringPlan | None], problems: Sequence[Problem], k: int
) -> list[GradeRow]:
    """Sample and grade the arms, given as name -> plan, in the step's folder; the grades, on every rank."""
    arms = [session.arm(name, plan) for name, plan in plans.items()]
    session.sample(step, arms, problems, k)
    return session.grade(step, problems)


def find_experts(session: Session, options: Options, step: str) -> ExpertScores:
    """Count the routing of the unsteered answers of a step, and score every expert; counts and scores are left in the folder."""
    path = session.folder / COUNTS
    if options.counts is not None:
        if session.ranks.is_main:
            shutil.copyfile(options.counts, path)
        session.ranks.barrier()
    else:
        count_answers(session, options, step, path)
    return scores_of(session, options)


def measure_afresh(session: Session, options: Options, scores: ExpertScores) -> ExpertScores:
    """The scores with what was chosen measured in the unsteered answers of the test, whose problems had no part in the choice. Given
    counts that cannot be measured there keep their halves, and the reason is said."""
    path = session.folder / FRESH_COUNTS
    count_answers(session, options, "test", path)
    try:
        return scores_of(session, options, RoutingCounts.load(path))
    except ValueError as error:
        if options.counts is None:
            raise
        session.ranks.say(f"     what was chosen is not measured in the test's answers: {error}")
        return scores


def count_answers(session: Session, options: Options, step: str, path: Path) -> None:
    """Leave the counts of a step's unsteered answers in a file, where it is not there yet."""
    if session.ranks.broadcast(path.exists()):
        return
    completions = [item for item in read_generations(session.folder / step) if item.arm == "baseline"]
    traces = sorted(traces_of(completions, session.tokenizer), key=lambda trace: trace.trace_id)
    markers = markers_for(session.tokenizer, options.markers, parse_coefficients(options.coefficients))
    references = references_for(session.tokenizer, traces, markers)
    counts = (
        collect_over_ranks(session.model, traces, markers, session.ranks, references=references)
        if session.connection is None
        else count_served(session.connection, traces, session.shape, markers, references=references)
    )
    if session.ranks.is_main:
        counts.save(path)
    session.ranks.barrier()


def scores_of(session: Session, options: Options, measured_on: RoutingCounts | None = None) -> ExpertScores:
    """The scores of the counts in the folder, which are left there too."""
    scores = score_experts(
        RoutingCounts.load(session.folder / COUNTS),
        parse_coefficients(options.coefficients) or None,
        min_support=options.min_support,
        missing_marker="skip",
        measured_on=measured_on,
    )
    if session.ranks.is_main:
        scores.save(session.folder / "scores.json")
    return scores


def keep_traces(
    session: Session, options: Options, plans: dict[str, SteeringPlan | None], scores: ExpertScores | None
) -> None:
    """Leave some answers of the test in the folder, with the tokens at which the experts fired, and the page to read them on."""
    experts = experts_to_show(plans, scores)
    if session.connection is not None:
        if experts:
            session.ranks.say(
                f"     no page of traces: it needs the model loaded; 'moe-steer inspect {session.folder}' makes it"
            )
        return
    ranks, layout = session.ranks, layout_of(session.model)
    found = (session.folder / VIEWS_FILE).is_file() if ranks.is_main else None
    if not experts or ranks.broadcast(found):
        return
    answers = None
    if ranks.is_main:
        answers = first_answers(list(read_generations(session.folder / "test")), list(plans), TRACES)
    answers = ranks.broadcast(answers)
    with lockstep(session.model):
        if ranks.is_main or layout.same_tokens:
            views = views_of(
                session.model,
                session.tokenizer,
                answers,
                plans,
                experts,
                markers_for(session.tokenizer, options.markers, {}),
                title=f"{options.model}: {session.options.run_name}",
                graded=session.folder / "test" if ranks.is_main else None,
            )
    if ranks.is_main:
        views.save(session.folder)
    ranks.barrier()


def questions_of(sets: ProblemSets) -> list[str]:
    """What the prompts ask."""
    return [problem.prompt for part in sets for problem in part]


def with_gain(plan: SteeringPlan, gain: float) -> SteeringPlan:
    """The same experts, all at another gain."""
    return dataclasses.replace(plan, experts=[dataclasses.replace(entry, gain=gain) for entry in plan.experts])


def candidate_plan(options: Options, scores: ExpertScores) -> SteeringPlan:
    """The top experts with evidence, or the best of all, which the plan then calls unproven; the gain is still to be chosen."""

    def select(max_q: float | None) -> SteeringPlan:
        return select_experts(
            scores,
            top=options.top,
            gain=options.gains[0],
            min_support=options.min_support,
            max_q=max_q,
            scope=options.scope,
            renormalize=options.renormalize,
        )

    try:
        return select(options.max_q)
    except Unproven:
        return select(None)


def tune_gain(
    session: Session, options: Options, plan: SteeringPlan, problems: Sequence[Problem]
) -> tuple[float, list[GradeRow]]:
    """The gain with the most correct answers on the tuning problems, and the grades of the sweep (baseline included).

    Ties go to the gain nearest to 1: the smallest intervention that does as well.
    """
    if len(options.gains) == 1:
        return options.gains[0], []
    arms = {"baseline": None, **{gain_name(gain): with_gain(plan, gain) for gain in options.gains}}
    rows = sample(session, "tuning", arms, problems, options.num_samples)
    correct = num_correct(rows)
    return max(options.gains, key=lambda gain: (correct[gain_name(gain)], -distance_from_one(gain))), rows


def distance_from_one(gain: float) -> float:
    """How strong a gain is: 4 and 1/4 are equally far from 1, and 0 is farthest."""
    return max(gain, 1 / gain) if gain else float("inf")
