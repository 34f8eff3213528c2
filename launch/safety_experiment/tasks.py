"""The tasks of the safety experiment: problems, how they are put, how long an answer may be, and who judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.ranks import Ranks
from launch.safety_experiment.options import ATTACKS, SafetyOptions
from launch.safety_experiment.prompts import Render, is_chat, own_answer, renderer
from launch.steps import own_folder
from moe_steer.backends import layout_of, lockstep
from reasoning_evals import Problem, grade, load_task, run_arms
from reasoning_evals.engines import FirstLetterSampler, InProcessSampler, Sampler, SamplingConfig
from reasoning_evals.runs import Arm, GradeRow, Judgement, grade_run, opens_thought, read_generations, read_run
from reasoning_evals.safety import LabelJudge, TextScore, answer_texts
from reasoning_evals.tasks import task_spec


@dataclass(frozen=True, kw_only=True)
class SafetyTask:
    """One task, the same for every arm but for the text before the question."""

    name: str
    problems: Sequence[Problem]
    source: str
    """Where the data came from, in words."""
    max_new_tokens: int
    chat: bool

    @property
    def is_attack(self) -> bool:
        """Whether a classifier judges the answers."""
        return self.name in ATTACKS

    @property
    def by_letter(self) -> bool:
        """Whether the answer is the likeliest letter rather than a text."""
        return self.name == "mmlu"

    @property
    def worked_examples(self) -> bool:
        """Whether solved examples precede the question."""
        return self.name == "gsm8k" and not self.chat

    def render(self, tokenizer: Any, prefix: str) -> Render:
        """Question -> prompt of an arm that puts ``prefix`` first."""
        return renderer(tokenizer, self.chat, prefix, self.worked_examples)

    def sampler(self, model: Any, tokenizer: Any) -> Sampler:
        """What answers."""
        return FirstLetterSampler(model, tokenizer) if self.by_letter else InProcessSampler(model, tokenizer)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values for the report."""
        return {
            "kind": "attack" if self.is_attack else "capability",
            "source": self.source,
            "num_problems": len(self.problems),
            "max_new_tokens": self.max_new_tokens,
            "asked": "chat template" if self.chat else "plain text" + (", two solved examples" * self.worked_examples),
            "judged_by": "classifier" if self.is_attack else "first letter" if self.by_letter else "grader",
        }


def safety_tasks(options: SafetyOptions, tokenizer: Any) -> list[SafetyTask]:
    """The tasks of the options with their problems; ValueError where data are missing or do not fit."""
    chat = is_chat(options.prompt_style, tokenizer)
    return [_task(name, options, chat) for name in options.tasks]


def _task(name: str, options: SafetyOptions, chat: bool) -> SafetyTask:
    spec = task_spec(name)
    folder = Path(options.data_dir or ".", spec.family)
    local = options.data_dir is not None and folder.is_dir()
    own_words = {"prompt": "{problem}"} if name == "gsm8k" and not chat else {}
    problems = load_task(
        name, data_dir=folder if local else None, num=options.num_problems, seed=options.seed, **own_words
    )
    long = options.gsm8k_tokens or (1024 if chat else 512)
    return SafetyTask(
        name=name,
        problems=problems,
        source=f"{spec.hub_id}, local files of {spec.family}" if local else f"{spec.hub_id} at {spec.revision}",
        max_new_tokens=options.attack_tokens if name in ATTACKS else 1 if name == "mmlu" else long,
        chat=chat,
    )


def sample(
    task: SafetyTask, arms: Sequence[Arm], options: SafetyOptions, ranks: Ranks, model: Any, folder: Path
) -> None:
    """Every arm's answers, into the task's folder; what is there already is kept."""
    index, number = layout_of(model).share
    config = SamplingConfig(
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=task.max_new_tokens,
        greedy=options.samples is None,
        batch_size=options.batch_size,
    )
    with own_folder(folder, model, ranks) as mine, lockstep(model):
        run_arms(
            arms,
            task.problems,
            mine,
            1 if task.by_letter else options.num_samples,
            config,
            options.seed,
            rank=index,
            world_size=number,
            progress=None if ranks.is_main else False,
            task=task.name,
        )
    ranks.barrier()


def judge(task: SafetyTask, folder: Path, classify: Any) -> list[GradeRow]:
    """The verdicts on a task's answers. ``classify``: texts -> scores, for attacks."""
    if task.is_attack:
        scores: dict[str, TextScore] = classify(answers_of(folder))
        return grade_run(folder, task.problems, LabelJudge(scores))
    if task.worked_examples:
        return grade_run(folder, task.problems, _grade_own_answer)
    return grade_run(folder, task.problems)


def answers_of(folder: Path) -> list[str]:
    """The different answer texts of a run folder, empty ones left out."""
    arms = read_run(folder)["config"]["arms"]
    return answer_texts((item.text, opens_thought(arms[item.arm], item.prompt)) for item in read_generations(folder))


def _grade_own_answer(problem: Problem, text: str, opened: bool) -> Judgement:
    return grade(problem, own_answer(text), opened=opened)
