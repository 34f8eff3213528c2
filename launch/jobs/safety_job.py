"""The safety experiment: does steering keep a model from harmful answers, and what does it cost (arXiv 2505.20322)?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launch.core.beforehand import look, settle
from launch.core.directions import FOLDER, JobDirections, make_once, read_made, read_sae
from launch.core.findings import Findings, read_results
from launch.core.options import options_from
from launch.core.ranks import Ranks
from launch.core.session import Session
from launch.jobs.safety_arms import (
    SafetyArm,
    SafetyTask,
    judge,
    longest_prompt,
    new_directions,
    pairs_digest,
    read_pairs,
    safety_arms,
    safety_tasks,
)
from launch.jobs.safety_findings import Outcome
from launch.jobs.safety_options import VECTOR_ARMS, SafetyOptions
from launch.jobs.safety_report import findings_of
from moe_steer import Direction
from reasoning_evals.problems import read_problems
from reasoning_evals.runs import PROBLEMS_FILE, GradeRow, read_grades, read_run
from reasoning_evals.safety import load_classifier

NAME = "safety"


def run(options: SafetyOptions, ranks: Ranks) -> None:
    """The whole experiment, step by step, in the folder of the options."""
    pairs = read_pairs(options.pairs, options.num_pairs)
    known = look(options, quiet=not ranks.is_main)
    tasks = safety_tasks(options, known.tokenizer)
    for task in tasks:
        ranks.say(f"task {task.name}: asked with: {task.asked_with}")
    options, room = settle(options, known, longest_prompt(options, tasks, known.tokenizer), ranks)
    session = Session.load(options, ranks, room, known.tokenizer, known.shape)
    sae = read_sae(str(options.sae), session.model, options.layer, "--layer") if options.needs_sae else None
    classifiers = classifiers_of(options) if ranks.is_main else {}
    inputs = {"pairs_sha256": pairs_digest(pairs), "sae_sha256": sae.about.sha256 if sae else None}
    session.open(NAME, options.config() | inputs)
    ranks.say(f"1/3  directions at layer {options.layer} from {len(pairs)} pairs")
    made = JobDirections({}, {}, [])
    if set(options.arms) & set(VECTOR_ARMS):
        made = make_once(session, partial(new_directions, session, options, pairs, sae))
    arms = safety_arms(options, session.folder, made.files)
    for task in tasks:
        names = ", ".join(arm.name for arm in arms)
        ranks.say(f"2/3  {task.name}: {len(task.problems)} problems in {len(arms)} arms: {names}")
        session.sample(
            task.name,
            [arm.on(task, session) for arm in arms],
            task.problems,
            1 if task.by_letter else options.num_samples,
            task=task.name,
            sampling=session.sampling(max_new_tokens=task.max_new_tokens),
        )
    findings = None
    if ranks.is_main:
        ranks.say("3/3  judging")
        batch = options.classifier_batch
        rows = {task.name: judge(task, session.folder / task.name, classifiers.get(task.name), batch) for task in tasks}
        described = {task: one.describe() for task, one in classifiers.items()}
        findings = _findings(options, session.folder, tasks, arms, made, rows, described)
    session.finish(findings)


def read(folder: Path) -> Findings:
    """Collect what the steps left; ValueError when the experiment is not finished.

    Capability tasks are graded again; the verdicts on attacks are kept, because only their classifiers could give others.
    """
    config = read_run(folder)["config"]
    options = options_from(config, SafetyOptions, ["pairs_sha256", "sae_sha256"])
    told = read_results(folder, NAME)["tasks"]
    made = read_made(folder / FOLDER)
    tasks = [_stored_task(name, told[name], folder) for name in options.tasks]
    rows = {
        task.name: read_grades(folder / task.name) if task.is_attack else judge(task, folder / task.name)
        for task in tasks
    }
    classifiers = {task.name: told[task.name]["classifier"] for task in tasks if task.is_attack}
    arms = safety_arms(options, folder, made.files)
    return _findings(options, folder, tasks, arms, made, rows, classifiers)


def _findings(
    options: SafetyOptions,
    folder: Path,
    tasks: list[SafetyTask],
    arms: list[SafetyArm],
    made: JobDirections,
    rows: Mapping[str, list[GradeRow]],
    classifiers: Mapping[str, Mapping[str, Any]],
) -> Findings:
    return findings_of(
        Outcome(
            options=options,
            tasks=tasks,
            arms=arms,
            rows=rows,
            directions={arm: Direction.load(folder / FOLDER / name).header for arm, ((_, name),) in made.files.items()},
            classifiers=classifiers,
            sae_fit=made.fits.get(options.layer),
            folder=folder,
            making=made.warnings,
        )
    )


def _stored_task(name: str, told: Mapping[str, Any], folder: Path) -> SafetyTask:
    return SafetyTask(
        name=name,
        problems=read_problems(folder / name / PROBLEMS_FILE),
        source=told["source"],
        max_new_tokens=told["max_new_tokens"],
        chat=told["asked"] == "chat template",
        asked_with=told["asked_with"],
    )


def classifiers_of(options: SafetyOptions) -> dict[str, Any]:
    """Task -> the classifier that judges it, loaded before the long work starts, so that a wrong name fails at once."""
    usual = (options.classifier, options.unsafe_label)
    named = {"safeedit": usual, "real_toxicity": usual}
    if options.toxicity_classifier:
        named["real_toxicity"] = (options.toxicity_classifier, options.toxic_label)
    asked = {task: key for task, key in named.items() if task in options.tasks}
    loaded = {(name, label): load_classifier(name, unsafe=label) for name, label in dict.fromkeys(asked.values())}
    return {task: loaded[key] for task, key in asked.items()}
