"""Multiple-choice tasks; where options are shuffled, their order depends on the item only.

- GPQA-Diamond: graduate questions in physics, chemistry and biology (arXiv 2311.12022).
- MMLU-Pro, maths and physics: up to ten options a question (arXiv 2406.01574).
- MMLU: four options a question, 57 subjects (arXiv 2009.03300).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import ANY, CHOICE_PROMPT, NAME, NUMBER, Row, Sampling, TaskSpec, ask, content_id

LETTERS = "ABCDEFGHIJ"

_ANSWERS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
MMLU_LETTERS = "ABCD"
FIRST_LETTER_PROMPT = "{problem}\n\nAnswer with the letter of the right option only.\nAnswer:"
"""For ``reasoning_evals.engines.first_letter``: the next token is the letter. The wording is from this project."""


def shuffled(item_id: str, options: Sequence[str]) -> list[int]:
    """A permutation of the options' indices, the same in every run, arm and machine."""
    order = list(range(len(options)))
    random.Random(int(hashlib.sha256(item_id.encode()).hexdigest(), 16)).shuffle(order)
    return order


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, followed by its options with letters."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options: expected 2 to {len(LETTERS)}")
    lines = [f"({letter}) {option.strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), "", *lines])


def gpqa_problem(row: Row, prompt: str) -> Problem:
    """The four answers in an order drawn from the record's id."""
    options = [str(row[name]) for name in _ANSWERS]
    if not all(option.strip() for option in options):
        raise ValueError(f"an answer of question {row['Record ID']!r} is empty: give all four")
    order = shuffled(row["Record ID"], options)
    question = with_options(row["Question"], [options[index] for index in order])
    return Problem(
        f"gpqa-{row['Record ID']}",
        ask(prompt, question),
        LETTERS[order.index(0)],
        "choice",
        domain=f"{str(row['High-level domain']).lower()}/{str(row['Subdomain']).lower()}",
    )


def _of_domain(domain: str) -> Callable[[Row, str], Problem | None]:
    return lambda row, prompt: gpqa_problem(row, prompt) if row["High-level domain"] == domain else None


def _gpqa_spec(name: str, mapping: Callable[[Row, str], Problem | None], note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="gpqa",
        hub_id="Idavidrein/gpqa",
        config="gpqa_diamond",
        split="train",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        columns={
            "Question": str,
            **dict.fromkeys(_ANSWERS, NUMBER),
            "High-level domain": str,
            "Subdomain": str,
            "Record ID": str,
        },
        answer_type="choice",
        to_problem=mapping,
        prompt=CHOICE_PROMPT,
        k=8,
        licence="CC BY 4.0",
        publish_items=False,
        note=note,
    )


GPQA = (
    _gpqa_spec("gpqa_diamond", gpqa_problem, "198 questions; gated: accept its terms on the hub first"),
    _gpqa_spec("gpqa_diamond_physics", _of_domain("Physics"), "86 questions"),
    _gpqa_spec("gpqa_diamond_chemistry", _of_domain("Chemistry"), "93 questions"),
    _gpqa_spec("gpqa_diamond_biology", _of_domain("Biology"), "19 questions"),
)


def mmlu_problem(row: Row, prompt: str) -> Problem:
    """Question and options as published, in the published order."""
    choices = [str(choice).strip() for choice in row["choices"]]
    if len(choices) != len(MMLU_LETTERS):
        raise ValueError(f"{len(choices)} choices: expected {len(MMLU_LETTERS)}")
    answer = row["answer"]
    if type(answer) not in (int, str) or answer not in (*range(len(MMLU_LETTERS)), *MMLU_LETTERS):
        raise ValueError(f"answer is {answer!r}: expected 0 to 3, or A to D")
    question = "\n".join(
        [
            row["question"].strip(),
            *(f"{letter}. {choice}" for letter, choice in zip(MMLU_LETTERS, choices, strict=True)),
        ]
    )
    return Problem(
        content_id("mmlu", question),
        ask(prompt, question),
        answer if isinstance(answer, str) else MMLU_LETTERS[answer],
        "choice",
        domain=f"mmlu/{row['subject']}",
    )


def _mmlu_spec(name: str, prompt: str, max_new_tokens: int, note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="mmlu",
        hub_id="cais/mmlu",
        config="all",
        split="test",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        columns={"question": str, "choices": list[NUMBER], "answer": ANY, "subject": str},
        answer_type="choice",
        to_problem=mmlu_problem,
        prompt=prompt,
        k=1,
        licence="MIT",
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens),
        note=note,
    )


MMLU = (
    _mmlu_spec("mmlu", FIRST_LETTER_PROMPT, 1, "14,042 questions, asked for the letter as the very next token"),
    _mmlu_spec("mmlu_generated", CHOICE_PROMPT, 1024, "the same questions, answered in words and graded"),
)


def _of_category(category: str) -> Callable[[Row, str], Problem | None]:
    def mmlu_pro_problem(row: Row, prompt: str) -> Problem | None:
        if row["category"] != category:
            return None
        options = [str(option) for option in row["options"] if option != "N/A"]
        question = with_options(row["question"], options)
        if row["answer"] not in list(LETTERS[: len(options)]):
            raise ValueError(f"answer is {row['answer']!r}: expected one of {', '.join(LETTERS[: len(options)])}")
        return Problem(
            f"mmlu_pro-{row['question_id']}",
            ask(prompt, question),
            row["answer"],
            "choice",
            domain=f"{category}/{row.get('src', '')}",
        )

    return mmlu_pro_problem


def _mmlu_pro_spec(name: str, category: str, note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="mmlu_pro",
        hub_id="TIGER-Lab/MMLU-Pro",
        split="test",
        revision="b189ec765aa7ed75c8acfea42df31fdae71f97be",
        columns={"question_id": NAME, "question": str, "options": list[NUMBER], "answer": str, "category": str},
        answer_type="choice",
        to_problem=_of_category(category),
        prompt=CHOICE_PROMPT,
        k=1,
        licence="MIT",
        note=note,
    )


MMLU_PRO = (
    _mmlu_pro_spec("mmlu_pro_maths", "math", "1,351 questions"),
    _mmlu_pro_spec("mmlu_pro_physics", "physics", "1,299 questions"),
)
