"""The evaluation: any arms (plans, prompts, decoding rules) on one model and one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from launch.core.beforehand import look, settle
from launch.core.findings import Findings, arm_lines, read_results, silent_arms
from launch.core.levers.arm_words import HINT, REMINDER, TRIAL, Words, arm_name, check_arms, parse_arm
from launch.core.option_checks import ReadBy, check_num_problems
from launch.core.options import BASELINE, ProblemOptions, options_from
from launch.core.prompt_options import own_wording
from launch.core.ranks import Ranks
from launch.core.served.server_options import EngineOptions
from moe_steer.console import counted
from moe_steer.lab import is_made_up
from reasoning_evals import Problem, compare_arms, load_task
from reasoning_evals.decoding import NOWAIT_WORDS
from reasoning_evals.prompts import FINISHED, THINKING_PROMPT
from reasoning_evals.runs import OPTIONS, GradeRow, grade_run, read_run
from reasoning_evals.thoughts import cut_line, cut_table, cut_thoughts

NAME = "evaluate"
LAB_PROBLEMS = 240


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EngineOptions, ProblemOptions):
    """Compare ways to control reasoning: steering plans, prompts, decoding rules."""

    arms: tuple[str, ...] = (BASELINE, "prompt-before", "prompt-after", "tip", "tip-close", "nowait")
    """baseline, plan:FILE, preset:NAME, prompt-before, prompt-after, no-thinking, thinking-off, effort:WORD, hint:N, tip[:ALPHA,BETA],
    tip-close[:ALPHA,BETA], nowait, budget:N, soft:N[,RAMP,GRACE,PEAK], remind:N, continue:N, deer[:THRESHOLD,TRIALS], exit:FILE, or several joined
    by +."""
    num_problems: int | None = None
    """The first so many problems; default all of a file or task, 240 of the lab."""
    switch_words: Annotated[tuple[str, ...], ReadBy(("tip", "tip-close"), where="--arms")] = ("Alternatively",)
    """Words that tip penalises."""
    ban_words: Annotated[tuple[str, ...], ReadBy(("nowait",), where="--arms")] = NOWAIT_WORDS
    """Words that nowait bans."""
    thinking_prompt: Annotated[str, ReadBy(("prompt-before", "prompt-after"), where="--arms")] = THINKING_PROMPT
    """Text of prompt-before and prompt-after."""
    go_on_word: Annotated[str, ReadBy(("continue",), where="--arms")] = "Wait"
    """What continue writes in place of the closing tag: a word of one token."""
    budget_hint: Annotated[str, ReadBy(("hint",), where="--arms")] = HINT
    """What hint adds to the question; {budget} is its number."""
    reminder: Annotated[str, ReadBy(("remind",), where="--arms")] = REMINDER
    """What remind writes into the thought."""
    exit_words: Annotated[tuple[str, ...], ReadBy(("deer",), where="--arms")] = ("Wait",)
    """Words of one token at which deer asks for a trial answer."""
    trial_prompt: Annotated[str, ReadBy(("deer",), where="--arms")] = TRIAL
    """What deer writes behind the thought, on trial, to read an answer; {close} is what ends a thought."""

    suffix: ClassVar[str] = "-evaluate"
    lab_rows: ClassVar[int] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arms(self.arms)
        check_num_problems(self.num_problems)
        for field in ("switch_words", "ban_words", "exit_words"):
            if not getattr(self, field) or not all(word.strip() for word in getattr(self, field)):
                raise ValueError(f"{field} are {list(getattr(self, field))}: give at least one word, and no empty one")

    def readers(self) -> Set[str]:
        return {*super().readers(), *self.kinds}

    @property
    def kinds(self) -> Set[str]:
        """The rules that some arm has."""
        return {rule.kind for word in self.arms for rule in parse_arm(word)}

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return BASELINE if BASELINE in self.arms else arm_name(parse_arm(self.arms[0]))


def run(options: EvaluateOptions, ranks: Ranks) -> None:
    """Sample every arm, grade, compare, report, in the folder of the options. What loads models is imported only now: --help is quick."""
    from launch.core.levers.arm_building import arm_of, load_plans
    from launch.core.session import Session
    from launch.core.wiring import check_fits

    plans = load_plans(options.arms)
    problems = _problems(options)
    known = look(options, quiet=not ranks.is_main)
    for word, plan in plans.items():
        check_fits(plan, known.shape, word)
    added = options.thinking_prompt if options.kinds & {"prompt-before", "prompt-after"} else ""
    added += FINISHED if "no-thinking" in options.kinds else ""
    added += options.budget_hint + "0" * 8 if "hint" in options.kinds else ""
    options, room = settle(options, known, known.longest_prompt([p.prompt for p in problems], added), ranks)
    session = Session.load(options, ranks, room, known.tokenizer, known.shape)
    words = Words(**{name: getattr(options, name) for name in Words._fields})
    session.require({arm_name(parse_arm(word)): plan for word, plan in plans.items()})
    built = [arm_of(session, word, plans.get(word), words) for word in options.arms]
    ranks.assert_same("the arms", {one.arm.name: one.plan.digest() if one.plan else None for one in built})
    revision = {"revision": options.revision}
    arms = [dataclasses.replace(one.arm, details={**one.arm.details, **revision}) for one in built]
    names = ", ".join(arm.name for arm in arms)
    ranks.say(
        f"{counted(len(problems), 'problem')} x {counted(options.num_samples, 'sample')} in {counted(len(arms), 'arm')}: {names}"
    )
    session.sample("", arms, problems, options.num_samples)
    session.record(NAME, **{OPTIONS: options.config()})
    rows = session.grade("", problems)
    findings = None
    if ranks.is_main:
        silent = silent_arms({one.arm.name: one.plan for one in built}, options.baseline, session.folder)
        findings = _findings(options, rows, silent, session.folder)
    session.finish(findings)


def read(folder: Path) -> Findings:
    """A finished evaluation; ValueError for one that is not finished, or that does not say its options."""
    run = read_run(folder)
    results = read_results(folder, NAME)
    if not isinstance(run.get(OPTIONS), dict):
        raise ValueError(
            f"{folder / 'run.json'} does not say which options it was made with: start launch/evaluate.py again with the same "
            "options, it samples nothing twice and writes the pages"
        )
    options = options_from(run[OPTIONS], EvaluateOptions)
    if (asked := [arm_name(parse_arm(word)) for word in options.arms]) != run["config"]["arm_order"]:
        raise ValueError(
            f"{folder / 'run.json'} has options for the arms {', '.join(asked)} and samples of {', '.join(run['config']['arm_order'])}: "
            "restore it"
        )
    return _findings(options, grade_run(folder), results["warnings"], folder)


def _problems(options: EvaluateOptions) -> list[Problem]:
    if is_made_up(options.problems):
        return load_task(options.problems, split="test", num=options.num_problems or LAB_PROBLEMS, seed=options.seed)
    problems = load_task(options.problems, data_dir=options.data_dir, **own_wording(options.problems, options.wording))
    wanted = options.num_problems
    if len(problems) < (wanted or 2):
        number = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        what = (
            f"{wanted} are wanted: give more, or lower --num-problems" if wanted else "a comparison needs 2: give more"
        )
        raise ValueError(f"{options.problems!r} holds {number}, {what}")
    return problems[:wanted]


def _findings(options: EvaluateOptions, rows: Sequence[GradeRow], silent: Sequence[str], folder: Path) -> Findings:
    from launch.core.levers.exit_probe import exit_warnings, mis_exits

    names = [arm_name(parse_arm(word)) for word in options.arms]
    comparison = compare_arms(rows, baseline=options.baseline)
    sentences = [pair.sentence for pair in comparison.pairs]
    arms = read_run(folder)["config"]["arms"]
    cuts = cut_thoughts(folder, rows, options.baseline)
    exits = {name: found for name in names if (found := mis_exits(arms[name], rows, options.baseline, name))}
    return Findings(
        folder=folder,
        step="",
        title=f"Ways to control the reasoning of {options.model}",
        comparison=comparison,
        results={
            "baseline": options.baseline,
            "arms": {name: arms[name]["details"] for name in names},
            "sentences": sentences,
            "comparison": comparison.to_dict(),
            **({"mis_exits": exits} if exits else {}),
            **({"cut_thoughts": [one.to_dict() for one in cuts]} if cuts else {}),
        },
        summary=[
            *arm_lines(comparison),
            *map(cut_line, cuts),
            *(one["sentence"] for one in exits.values()),
            *sentences,
        ],
        tables={"Cut thoughts": cut_table(cuts)} if cuts else {},
        facts={
            "Model": options.model + (f", revision {options.revision}" if options.revision else ""),
            "Arms": ", ".join(names),
            "Sampling": options.sampling_in_words,
        },
        warnings=list(dict.fromkeys([*silent, *exit_warnings(exits, read_run(folder)["config"]["sampling"])])),
        silent=silent,
        then=[
            "moe-steer export {folder} --format parquet --out samples.parquet    every answer and grade, one row each"
        ],
    )
