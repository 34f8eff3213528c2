"""What the safety experiment samples: its tasks (problems, how they are put, how long an answer may be, who judges it), and its arms (the model as
it is, with a prompt before the question, or with a vector from pairs added)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.core.directions import FOLDER, NewDirections, from_contrast
from launch.core.prompt_options import asked_with, own_wording
from launch.core.session import Session
from launch.jobs.safety_options import ATTACKS, VECTOR_ARMS, SafetyOptions
from moe_steer import ResidualVector, SteeringPlan
from moe_steer.contrasts import answer_pairs
from moe_steer.saes import SAE
from moe_steer.thinking import Thought
from reasoning_evals import Problem, load_task
from reasoning_evals.engines import FirstLetterSampler, InProcessSampler, Sampler
from reasoning_evals.grading import grade_thought
from reasoning_evals.prompts import RenderedPrompt, render_prompt
from reasoning_evals.runs import Arm, GradeRow, Judgement, digest, grade_run, read_generations, read_run, run_thoughts
from reasoning_evals.safety import LabelJudge, TextScore
from reasoning_evals.tasks import read_rows, task_spec

Render = Callable[[str], RenderedPrompt]
WORKED_EXAMPLES = (
    "Question: A baker makes 12 trays of 8 rolls. She sells 70 rolls. How many rolls are left?\n"
    "Answer: She makes 12 * 8 = 96 rolls. After selling 70, 96 - 70 = 26 rolls are left. The answer is \\boxed{26}.\n\n"
    "Question: Tickets cost 9 dollars for adults and 5 dollars for children. How much do 2 adults and 3 children pay?\n"
    "Answer: The adults pay 2 * 9 = 18 dollars and the children 3 * 5 = 15 dollars. Together they pay 18 + 15 = 33 dollars. "
    "The answer is \\boxed{33}.\n\n"
)
"""Two worked examples for GSM8K in plain style."""
_NEXT_QUESTION = re.compile(r"\n\s*Question:")


@dataclass(frozen=True, kw_only=True)
class SafetyTask:
    """One task, the same for every arm but for the text before the question."""

    name: str
    problems: Sequence[Problem]
    source: str
    """Where the data came from, in words."""
    max_new_tokens: int
    chat: bool
    asked_with: str
    """The words around each question, in one line."""

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
            "asked_with": self.asked_with,
            "judged_by": "classifier" if self.is_attack else "first letter" if self.by_letter else "grader",
        }


def longest_prompt(options: SafetyOptions, tasks: Sequence[SafetyTask], tokenizer: Any) -> int:
    """Tokens of the longest prompt of any task in any arm."""
    prefixes = {options.prompt(arm) for arm in options.arms}
    renders = [(task.render(tokenizer, prefix), task.problems) for task in tasks for prefix in prefixes]
    return max(len(render(problem.prompt).token_ids) for render, problems in renders for problem in problems)


def safety_tasks(options: SafetyOptions, tokenizer: Any) -> list[SafetyTask]:
    """The tasks of the options with their problems; ValueError where data are missing or do not fit."""
    chat = is_chat(options.prompt_style, tokenizer)
    return [_task(name, options, chat) for name in options.tasks]


def _task(name: str, options: SafetyOptions, chat: bool) -> SafetyTask:
    spec = task_spec(name)
    folder = Path(options.data_dir or ".", spec.family)
    local = options.data_dir is not None and folder.is_dir()
    own_words = own_wording(name, options.wordings.get(name))
    if name == "gsm8k" and not chat:
        own_words = {"prompt": "{problem}"} | own_words
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
        asked_with=asked_with(name, **own_words),
    )


def judge(task: SafetyTask, folder: Path, classifier: Any = None, batch: int = 32) -> list[GradeRow]:
    """The verdicts on a task's answers. ``classifier``: for attacks; it reads ``batch`` texts together."""
    if task.is_attack:
        scores: dict[str, TextScore] = classifier.score(answers_of(folder), batch)
        return grade_run(folder, task.problems, LabelJudge(scores))
    if task.worked_examples:
        return grade_run(folder, task.problems, _grade_own_answer)
    return grade_run(folder, task.problems)


def answers_of(folder: Path) -> list[str]:
    """The different answer texts of a run folder, empty ones left out."""
    readers = run_thoughts(read_run(folder)["config"])
    answers = (readers[item.arm].split(item.text, item.prompt).answer for item in read_generations(folder))
    return list(dict.fromkeys(answer for answer in answers if answer))


def _grade_own_answer(problem: Problem, thought: Thought) -> Judgement:
    return grade_thought(problem, thought._replace(answer=own_answer(thought.answer)))


def is_chat(style: str, tokenizer: Any) -> bool:
    """Whether questions are put in the chat template; ValueError where chat is asked for and there is none."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if style == "chat" and not has_template:
        raise ValueError("--prompt-style chat needs a chat template, the tokenizer has none: use plain")
    return has_template if style == "auto" else style == "chat"


def renderer(tokenizer: Any, chat: bool, prefix: str = "", worked_examples: bool = False) -> Render:
    """Question -> prompt. ``prefix`` comes first, in the user's own turn (Gemma's template has no system turn).

    ``worked_examples``: the question follows two solved ones; for base models, which otherwise do not know what is wanted.
    """

    def render(question: str) -> RenderedPrompt:
        text = f"{WORKED_EXAMPLES}Question: {question}\nAnswer:" if worked_examples else question
        text = f"{prefix}\n\n{text}" if prefix else text
        return render_prompt(tokenizer, text, thinking=False) if chat else plain_prompt(tokenizer, text)

    return render


def plain_prompt(tokenizer: Any, text: str) -> RenderedPrompt:
    """The bare text, with BOS where this tokenizer starts texts with it."""
    bos = tokenizer.bos_token
    starts = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    whole = f"{bos}{text}" if starts else text
    return RenderedPrompt(whole, tuple(tokenizer(whole, add_special_tokens=False)["input_ids"]))


def own_answer(text: str) -> str:
    """What a base model wrote before it made up the next question."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0]


_COLUMNS = (
    ("question", "matching", "not_matching"),
    ("adversarial prompt", "safe generation", "unsafe generation"),
)


class SafetyArm(NamedTuple):
    """One arm, before a task is chosen."""

    name: str
    prefix: str
    """Text before every question; "" for none."""
    plan: SteeringPlan | None

    def on(self, task: SafetyTask, session: Session) -> Arm:
        """This arm on a task."""
        arm = session.arm(self.name, self.plan)
        return dataclasses.replace(
            arm,
            sampler=task.sampler(session.model, session.tokenizer),
            details={"prefix": self.prefix, **arm.details},
            render=task.render(session.tokenizer, self.prefix),
        )


class SafetyPair(NamedTuple):
    """A question with a safe (matching) and an unsafe (not matching) answer."""

    question: str
    matching: str
    not_matching: str


def safety_arms(
    options: SafetyOptions, folder: Path, files: Mapping[str, Sequence[tuple[int, str]]]
) -> list[SafetyArm]:
    """The arms of the options in their order, vector arms at every strength. ``files``: arm -> its direction in the run's folder.

    As in the paper a vector is added at the output of one layer, at every position, BOS and prompt included.
    """
    arms = []
    for name in options.arms:
        if name not in VECTOR_ARMS:
            arms.append(SafetyArm(name, options.prompt(name), None))
            continue
        ((_, file),) = files[name]
        for strength in options.strengths:
            shown = name if len(options.strengths) == 1 else f"{name} x{strength:g}"
            vector = ResidualVector(layer=options.layer, file=file, strength=strength, scope="all")
            arms.append(SafetyArm(shown, "", SteeringPlan(residual=[vector], base_dir=str(folder / FOLDER))))
    return arms


def read_pairs(path: str, num: int | None = None) -> list[SafetyPair]:
    """The pairs of a file: the paper's columns (question, matching, not_matching) or SafeEdit's own. ValueError names what is wrong."""
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file of pairs {path!r}: give a CSV, JSON or JSONL file with {', '.join(_COLUMNS[0])}"
        )
    pairs = []
    for where, row in read_rows(Path(path)):
        columns = next((names for names in _COLUMNS if all(name in row for name in names)), None)
        if columns is None:
            raise ValueError(f"{where}: pairs need the columns {', '.join(_COLUMNS[0])}, the row has {', '.join(row)}")
        values = [row[name] for name in columns]
        if not all(isinstance(value, str) for value in values) or not values[0].strip():
            raise ValueError(f"{where}: question and answers have to be texts, and the question not empty")
        pairs.append(SafetyPair(*values))
        if len(pairs) == num:
            return pairs
    if num is not None or not pairs:
        raise ValueError(
            f"{path} holds {len(pairs)} pairs, {num or 'at least 1'} are wanted: give more, or lower --num-pairs"
        )
    return pairs


def pairs_digest(pairs: Sequence[SafetyPair]) -> str:
    """16 hexadecimal digits over all texts, in order."""
    return digest([list(pair) for pair in pairs])


def new_directions(
    session: Session, options: SafetyOptions, pairs: Sequence[SafetyPair], sae: SAE | None
) -> NewDirections:
    """The directions of the vector arms, from the answers of the pairs. ValueError as the directions raise it."""
    chat = is_chat(options.prompt_style, session.tokenizer)
    sequences = answer_pairs(pairs, session.tokenizer, chat=chat)
    saes = {} if sae is None else {options.layer: sae}
    methods = [arm for arm in options.arms if arm in VECTOR_ARMS]
    notes = {"contrast": "answers", "chat": chat}
    how = {"keep": options.keep, "parity": options.parity}
    return from_contrast(session, sequences, methods, [options.layer], saes, notes, **how)
