"""The main job: find the experts that think, turn them up, compare with the baseline and a placebo.

Each step is a function of what the steps before it left in the run folder, on every rank alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from expert_stats import ExpertScores, RoutingCounts, Trace, Unproven, select_experts, select_placebo
from launch.core.beforehand import look, settle
from launch.core.findings import Findings
from launch.core.options import options_from
from launch.core.outcomes import closing_tag, decision_causes
from launch.core.problem_sets import ProblemSets, problem_sets
from launch.core.ranks import Ranks
from launch.core.served.checking import count_served
from launch.core.session import Session
from launch.core.trace_views import keep_traces
from launch.core.wiring import (
    broadcast_plan,
    collect_over_ranks,
    markers_for,
    parse_coefficients,
    references_for,
    traces_of,
)
from launch.jobs.experts_findings import (
    CAUSES,
    COUNTS,
    FRESH_COUNTS,
    Outcome,
    evidence_of,
    findings_of,
    gain_name,
    num_correct,
    scored,
)
from launch.jobs.experts_options import Options, check_kind, given_plan, inputs_of
from moe_steer import SteeringPlan
from moe_steer.console import counted
from reasoning_evals import Problem
from reasoning_evals.runs import GradeRow, grade_run, read_generations, read_run

NAME = "steer_r1"
CALIBRATION = 64
"""Unsteered answers that firing rates are taken from when the plan is given."""


def run(options: Options, ranks: Ranks) -> None:
    """The whole job, step by step, in the folder of the options."""
    plan = given_plan(options)
    sets = problem_sets(options)
    known = look(options, quiet=not ranks.is_main)
    check_kind(options, plan, known.shape)
    if options.by == "causes":
        closing_tag(known.tokenizer)  # refuses a model that does not think
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
        candidates = candidate_plans(options, scores)
        for line in dict.fromkeys(evidence_of(plan, scores, options) for plan in candidates.values()):
            ranks.say(f"     {line}")
        if session.connection is not None:  # a placebo of every gain is drawn for a server alone
            session.require(needed_plans(options, candidates, scores))
        gains = ", ".join(f"{gain:g}" for gain in options.gains)
        ranks.say(f"3/4  {len(sets.tuning)} tuning problems: choosing the gain among {gains}")
        plan, tuning = tune_gain(session, options, candidates, sets.tuning)
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
    ranks.say(
        f"{last}  {counted(len(sets.test), 'test problem')} x {counted(k, 'sample')} in {counted(len(arms), 'arm')}: {', '.join(arms)}"
    )
    test = sample(session, "test", arms, sets.test, k)
    if scores and not options.given and options.by == "npmi":
        scores = measure_afresh(session, options, scores)
    keep_traces(session, arms, scores, options.markers)
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


def needed_plans(
    options: Options, candidates: Mapping[float, SteeringPlan], scores: ExpertScores
) -> dict[str, SteeringPlan]:
    """Every plan that may be an arm of the tuning or of the test: a server takes them when it starts."""
    plans = {gain_name(gain): plan for gain, plan in candidates.items()}
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
    """Count the routing of the unsteered answers of a step, and score every expert; counts and scores are left in the folder, and with --by
    causes the causes."""
    path, by = session.folder / COUNTS, session.folder / CAUSES
    if options.counts is not None:
        if session.ranks.is_main:
            shutil.copyfile(options.counts, path)
        session.ranks.barrier()
    missing = session.ranks.broadcast([not path.exists(), options.by == "causes" and not by.exists()])
    if any(missing):
        traces = unsteered_traces(session, step)
        if missing[0]:
            count(session, options, traces, path)
        if missing[1]:
            take_causes(session, options, traces, by)
    return kept(session, scored(session.folder, options, options.by))


def measure_afresh(session: Session, options: Options, scores: ExpertScores) -> ExpertScores:
    """The scores with what was chosen measured in the unsteered answers of the test, whose problems had no part in the choice. Where a
    server does not send its routing there, or given counts cannot be measured there, the scores keep their halves, and the reason is said."""
    path = session.folder / FRESH_COUNTS
    try:
        if not session.ranks.broadcast(path.exists()):
            count(session, options, unsteered_traces(session, "test"), path)
        return kept(session, scored(session.folder, options, options.by, RoutingCounts.load(path)))
    except ValueError as error:
        if options.counts is None and session.connection is None:
            raise
        session.ranks.say(f"     what was chosen is not measured in the test's answers: {error}")
        return scores


def unsteered_traces(session: Session, step: str) -> list[Trace]:
    """The unsteered answers of a step, in one order on all ranks."""
    completions = [item for item in read_generations(session.folder / step) if item.arm == "baseline"]
    return sorted(traces_of(completions, session.tokenizer), key=lambda trace: trace.trace_id)


def kept(session: Session, scores: ExpertScores) -> ExpertScores:
    """The scores, left in the folder too."""
    if session.ranks.is_main:
        scores.save(session.folder / "scores.json")
    return scores


def count(session: Session, options: Options, traces: Sequence[Trace], path: Path) -> None:
    """The routing of answers at the markers, in a file."""
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


def take_causes(session: Session, options: Options, traces: Sequence[Trace], path: Path) -> None:
    """The causes of going on, in a file."""
    causes = decision_causes(session.model, session.tokenizer, traces, options.tokens, session.ranks, options.wanted)
    if session.ranks.is_main:
        causes.save(path)
    session.ranks.barrier()


def questions_of(sets: ProblemSets) -> list[str]:
    """What the prompts ask."""
    return [problem.prompt for part in sets for problem in part]


def candidate_plans(options: Options, scores: ExpertScores) -> dict[float, SteeringPlan]:
    """A plan for each gain to be tried, of the top experts with evidence, or of the best of all, which the plan then calls unproven. Of a
    measure with two sides gains below 1 take other experts than those above it."""

    def select(gain: float, max_q: float | None) -> SteeringPlan:
        return select_experts(
            scores,
            top=options.top,
            gain=gain,
            min_support=options.min_support,
            max_q=max_q,
            scope=options.scope,
            renormalize=options.renormalize,
        )

    plans = {}
    for gain in options.gains:
        try:
            plans[gain] = select(gain, options.max_q)
        except Unproven:
            plans[gain] = select(gain, None)
    return plans


def tune_gain(
    session: Session, options: Options, candidates: Mapping[float, SteeringPlan], problems: Sequence[Problem]
) -> tuple[SteeringPlan, list[GradeRow]]:
    """The plan of the gain with the most correct answers on the tuning problems, and the grades of the sweep (baseline included).

    Ties go to the gain nearest to 1: the smallest intervention that does as well.
    """
    if len(candidates) == 1:
        return next(iter(candidates.values())), []
    arms = {"baseline": None, **{gain_name(gain): plan for gain, plan in candidates.items()}}
    rows = sample(session, "tuning", arms, problems, options.num_samples)
    correct = num_correct(rows)
    return candidates[max(candidates, key=lambda gain: (correct[gain_name(gain)], -distance_from_one(gain)))], rows


def distance_from_one(gain: float) -> float:
    """How strong a gain is: 4 and 1/4 are equally far from 1, and 0 is farthest."""
    return max(gain, 1 / gain) if gain else float("inf")
