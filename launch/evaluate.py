"""Compare ways to control reasoning on one model and one task: steering plans, prompts, decoding rules.

    deepspeed launch/evaluate.py                                   the embedded model, RICE's baselines
    deepspeed launch/evaluate.py --arms baseline plan:plan.json tip nowait budget:64 prompt-before prompt-after
    deepspeed --num_accelerators 2 launch/evaluate.py --model PATH_OR_HUB_ID --problems aime2024 --samples 16

An arm is baseline, plan:FILE, preset:NAME, prompt-before, prompt-after, tip[:ALPHA,BETA], tip-close[:ALPHA,BETA], nowait, budget:N,
or several of them joined by +. All arms are compared with the baseline (without one: with the first arm).

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.arm_specs import BASELINE, Words, arm_name, build_arm, check_arms, load_plans, parse_arm
from launch.options import Options
from launch.ranks import Ranks, leave
from launch.shared_options import (
    Backend,
    DataDir,
    Dtype,
    Greedy,
    LocalRank,
    MaxNewTokens,
    Offload,
    Out,
    Revision,
    StrictArms,
    Temperature,
    TopP,
    TrustRemoteCode,
    check_num_problems,
    config_of,
    load_asked,
    refuse_greedy_samples,
    refuse_idle_data_dir,
    refuse_idle_drawing,
    refuse_unread,
)
from launch.start import start
from reasoning_evals.decoding import NOWAIT_WORDS
from reasoning_evals.prompts import THINKING_PROMPT
from reasoning_evals.runs import RUN_FILE, read_run
from reasoning_evals.whole_files import write_whole

LAB_PROBLEMS = 240
_READ_BY = {
    "switch_words": ("tip", "tip-close"),
    "ban_words": ("nowait",),
    "thinking_prompt": ("prompt-before", "prompt-after"),
}
"""Option -> the rules that follow it."""
OPTIONS = "evaluate_options"
"""Where run.json keeps the options."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Compare ways to control reasoning: steering plans, prompts, decoding rules."""

    arms: tuple[str, ...] = (BASELINE, "prompt-before", "prompt-after", "tip", "tip-close", "nowait")
    """baseline, plan:FILE, preset:NAME, prompt-before, prompt-after, tip[:ALPHA,BETA], tip-close[:ALPHA,BETA], nowait,
    budget:N, or several joined by +."""
    model: str = "lab"
    """Model folder, hub id, or 'lab' or 'lab-dense' for an embedded model."""
    problems: str = "lab"
    """A JSONL file of problems, or the name of a task."""
    data_dir: DataDir = None
    num_problems: int | None = None
    """The first so many problems; default all of a file or task, 240 of the lab."""
    samples: int | None = None
    """Samples a problem and arm; default 4."""
    greedy: Greedy = False
    switch_words: tuple[str, ...] = ("Alternatively",)
    """Words that tip penalises."""
    ban_words: tuple[str, ...] = NOWAIT_WORDS
    """Words that nowait bans."""
    thinking_prompt: str = THINKING_PROMPT
    """Text of prompt-before and prompt-after."""
    out: Out = None
    name: str | None = None
    """Name of the run; default the model's name with -evaluate."""
    seed: int = 0
    """Decides the samples, and the problems of the lab."""
    temperature: Temperature = 0.6
    top_p: TopP = 0.95
    max_new_tokens: MaxNewTokens = None
    batch_size: int = 64
    """Samples decoded together."""
    backend: Backend = "auto"
    offload: Offload = ""
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    strict: StrictArms = False
    local_rank: LocalRank = 0

    def __post_init__(self) -> None:
        check_arms(self.arms)
        check_num_problems(self.num_problems)
        for field in ("switch_words", "ban_words"):
            if not getattr(self, field) or not all(word.strip() for word in getattr(self, field)):
                raise ValueError(f"{field} are {list(getattr(self, field))}: give at least one word, and no empty one")
        self.job()

    def check_asked(self) -> None:
        """ValueError for options that nothing in the run would follow."""
        refuse_idle_data_dir(self)
        if self.greedy:
            refuse_idle_drawing(self)
            refuse_greedy_samples(self.samples)
        refuse_unread(self, _READ_BY, {rule.kind for word in self.arms for rule in parse_arm(word)}, "--arms")

    @property
    def num_samples(self) -> int:
        """Samples a problem and arm."""
        return 1 if self.greedy else self.samples or 4

    @property
    def reference(self) -> int:
        """Which arm the others are compared with."""
        return self.arms.index(BASELINE) if BASELINE in self.arms else 0

    def job(self) -> Options:
        """The same settings as the main job's, where it has them; ValueError as there."""
        return Options.like(self, name=self.name or self._default_name, samples=None if self.greedy else self.samples)

    @property
    def _default_name(self) -> str:
        return self.model.rstrip("/").split("/")[-1] + "-evaluate" + ("-greedy" if self.greedy else "")


def main(argv: Sequence[str] | None = None, program: str = "evaluate.py") -> int:
    """Parse, run, report; returns the exit code."""
    return start(EvaluateOptions, run, argv, program, __doc__)


def run(options: EvaluateOptions, ranks: Ranks) -> None:
    """Sample every arm, grade, compare, report, in the folder of the options."""
    from launch.firing import silent_arms
    from launch.sharded import record_start, refuse_different
    from launch.steps import Bench
    from reasoning_evals import load_task

    plans = load_plans(options.arms)
    if options.problems == "lab":
        problems = load_task("lab", split="test", num=options.num_problems or LAB_PROBLEMS, seed=options.seed)
    else:
        problems = load_task(options.problems, data_dir=options.data_dir)
        refuse_fewer(problems, options.num_problems, options.problems)
        problems = problems[: options.num_problems]
    model, tokenizer = load_asked(options)
    words = Words(options.switch_words, options.ban_words, options.thinking_prompt)
    built = [build_arm(word, model, tokenizer, plans.get(word), words) for word in options.arms]
    built = [one._replace(arm=_with_revision(one.arm, options.revision)) for one in built]
    refuse_different("the arms", {one.arm.name: one.plan.digest() if one.plan else None for one in built}, ranks)
    bench = Bench(
        options=options.job(), ranks=ranks, model=model, tokenizer=tokenizer, folder=Path(options.job().folder)
    )
    names = ", ".join(one.arm.name for one in built)
    ranks.say(f"{len(problems)} problems x {options.num_samples} samples in {len(built)} arms: {names}")
    rows = bench.sample("", [one.arm for one in built], problems, options.num_samples)
    record_start(bench.folder, model, ranks)
    silent: list[str] = []
    if ranks.is_main:
        record_options(options, bench.folder)
        reference = built[options.reference].arm.name
        silent = silent_arms({one.arm.name: one.plan for one in built}, reference, bench.folder)
        print(publish(options, rows, silent, bench.folder))
    if options.strict and (silent := ranks.agree(silent)):
        raise RuntimeError("; ".join(silent))


def refuse_fewer(problems: Sequence[Any], wanted: int | None, source: str) -> None:
    """ValueError for fewer problems than were asked for, or than a comparison needs."""
    if len(problems) < (wanted or 2):
        number = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        what = (
            f"{wanted} are wanted: give more, or lower --num-problems" if wanted else "a comparison needs 2: give more"
        )
        raise ValueError(f"{source!r} holds {number}, {what}")


def record_options(options: EvaluateOptions, folder: Path) -> None:
    """Into run.json, beside its config: the pages need them, and they are no part of what the run is."""
    run = read_run(folder)
    run[OPTIONS] = config_of(options)
    write_whole(folder / RUN_FILE, json.dumps(run, indent=1, sort_keys=True) + "\n")


def publish(options: EvaluateOptions, rows: Sequence[Any], silent: Sequence[str], folder: Path) -> str:
    """Write results.json, report.md and report.html; returns the summary. ``silent``: what is said about arms without effect."""
    from launch.results_file import write_results
    from reasoning_evals import compare_arms
    from reasoning_evals.report import build_report, write_pages

    names = [arm_name(parse_arm(word)) for word in options.arms]
    reference = names[options.reference]
    comparison = compare_arms(rows, baseline=reference)
    sentences = [pair.sentence for pair in comparison.pairs]
    arms = read_run(folder)["config"]["arms"]
    results: dict[str, Any] = {
        "version": 1,
        "baseline": reference,
        "arms": {name: arms[name]["details"] for name in names},
        "sentences": sentences,
        "warnings": list(silent),
        "comparison": comparison.to_dict(),
    }
    write_results(folder, results)
    job = options.job()
    rule = "greedy" if job.greedy else f"temperature {job.temperature:g}, top-p {job.top_p:g}"
    facts = {
        "Model": options.model + (f", revision {options.revision}" if options.revision else ""),
        "Arms": ", ".join(names),
        "Sampling": f"{rule}, at most {job.token_limit} new tokens, seed {options.seed}",
        **{f"Warning {number}": warning for number, warning in enumerate(silent, 1)},
    }
    report = build_report(folder, comparison, title=f"Ways to control the reasoning of {options.model}", facts=facts)
    write_pages(report, folder)
    lines = [""]
    for arm in comparison.arms:
        tokens = f"  {arm.thinking_tokens.mean:8.1f} thinking tokens" if arm.thinking_tokens else ""
        accuracy = f"{100 * arm.accuracy.mean:5.1f}% ({100 * arm.accuracy.low:.1f} to {100 * arm.accuracy.high:.1f})"
        lines.append(f"{arm.name:24} {accuracy} correct{tokens}  {100 * arm.truncated:5.1f}% truncated")
    lines += [*sentences, *(f"WARNING: {warning}" for warning in silent)]
    lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)


def _with_revision(arm: Any, revision: str | None) -> Any:
    return dataclasses.replace(arm, details={**arm.details, "revision": revision})


if __name__ == "__main__":
    leave(main())
