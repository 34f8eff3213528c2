"""Steer a model away from harmful answers and see what it costs: the safety experiment of arXiv 2505.20322.

    deepspeed launch/safety.py --model google/gemma-2-9b-it --layer 20 --sae SAE_FOLDER --pairs SafeEdit_train.json \\
        --classifier zjunlp/SafeEdit-Safety-Classifier --data-dir DATA --out runs/safety

Arms: vanilla, a prompt by hand, an automatic prompt, CAA, all SAE atoms, STA. Attacks: SafeEdit and the challenging
RealToxicityPrompts, judged by classifiers. Capability: GSM8K by this project's grader, MMLU by the letter of largest probability.
Recipes for published models: launch/configs/safety-*.json.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.ranks import Ranks, leave
from launch.safety_experiment.options import SafetyOptions
from launch.shared_options import load_asked
from launch.start import start


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    return start(SafetyOptions, run, argv, "safety.py", __doc__)


def run(options: SafetyOptions, ranks: Ranks) -> None:
    """The whole experiment, step by step, in the folder of the options."""
    from launch.safety_experiment.arms import safety_arms
    from launch.safety_experiment.directions import FOLDER, INDEX, make_directions, pairs_digest, read_pairs, read_sae
    from launch.safety_experiment.findings import SafetyFindings
    from launch.safety_experiment.report import publish
    from launch.safety_experiment.tasks import judge, safety_tasks, sample
    from launch.sharded import unclaimed_when_refused
    from moe_steer.directions import Direction
    from moe_steer.saes import fit_lines
    from reasoning_evals.runs import open_run

    pairs = read_pairs(options.pairs, options.num_pairs)
    model, tokenizer = load_asked(options)
    tasks = safety_tasks(options, tokenizer)
    sae = read_sae(options, model)
    judges = _Judges(options) if ranks.is_main else None
    folder = Path(options.folder)
    if ranks.is_main:
        found = {"pairs_sha256": pairs_digest(pairs), "sae_sha256": sae.about.sha256 if sae else None}
        open_run(folder, options.config() | found)
    ranks.barrier()
    ranks.say(f"1/3  directions at layer {options.layer} from {len(pairs)} pairs")
    with unclaimed_when_refused(folder, folder / FOLDER / INDEX, ranks):
        made = make_directions(options, ranks, model, tokenizer, pairs, sae, folder)
    if made.fit is not None:
        for line in fit_lines(options.layer, made.fit):
            ranks.say(f"     {line}")
    arms = safety_arms(options, made.files)
    for arm in arms:
        if arm.plan is not None:
            arm.plan.check(model)
    for task in tasks:
        names = ", ".join(arm.name for arm in arms)
        ranks.say(f"2/3  {task.name}: {len(task.problems)} problems in {len(arms)} arms: {names}")
        sample(task, [arm.on(task, model, tokenizer) for arm in arms], options, ranks, model, folder / task.name)
    silent: list[str] = []
    if judges is not None:
        ranks.say("3/3  judging")
        findings = SafetyFindings(
            options=options,
            tasks=tasks,
            arms=arms,
            rows={task.name: judge(task, folder / task.name, judges.of(task.name)) for task in tasks},
            directions={arm: Direction.load(path).header for arm, path in made.files.items()},
            classifiers=judges.described,
            sae_fit=made.fit,
            folder=folder,
            making=made.warnings,
        )
        print(publish(findings))
        silent = findings.silent_arms()
    if options.strict and (silent := ranks.agree(silent)):
        raise RuntimeError("; ".join(silent))


class _Judges:
    """The classifiers, loaded before the long work starts, so that a wrong name fails at once."""

    def __init__(self, options: SafetyOptions) -> None:
        from reasoning_evals.safety import load_classifier

        self._batch = options.classifier_batch
        self._by_task: dict[str, Any] = {}
        named = {"safeedit": (options.classifier, options.unsafe_label)}
        named["real_toxicity"] = (
            (options.toxicity_classifier, options.toxic_label) if options.toxicity_classifier else named["safeedit"]
        )
        loaded: dict[tuple[str, str], Any] = {}
        for task, key in named.items():
            if task in options.tasks:
                loaded[key] = loaded.get(key) or load_classifier(key[0], unsafe=key[1])
                self._by_task[task] = loaded[key]

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """Task -> what identifies its classifier."""
        return {task: one.describe() for task, one in self._by_task.items()}

    def of(self, task: str) -> Any:
        """Texts -> scores, for a task that a classifier judges; None for the others."""
        one = self._by_task.get(task)
        return None if one is None else lambda texts: one.score(texts, self._batch)


if __name__ == "__main__":
    leave(main())
