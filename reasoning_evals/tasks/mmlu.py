"""MMLU: four options a question, 57 subjects (arXiv 2009.03300)."""

from __future__ import annotations

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import CHOICE_PROMPT, Row, Sampling, TaskSpec, ask, content_id

LETTERS = "ABCD"
FIRST_LETTER_PROMPT = "{problem}\n\nAnswer with the letter of the right option only.\nAnswer:"
"""For ``reasoning_evals.first_letter``: the next token is the letter. The wording is this project's own."""


def to_problem(row: Row, prompt: str) -> Problem:
    """Question and options as published, in the published order."""
    choices = [str(choice).strip() for choice in row["choices"]]
    if len(choices) != len(LETTERS):
        raise ValueError(f"{len(choices)} choices: expected {len(LETTERS)}")
    answer = row["answer"]
    if isinstance(answer, bool) or answer not in (*range(len(LETTERS)), *LETTERS):
        raise ValueError(f"answer is {answer!r}: expected 0 to 3, or A to D")
    question = "\n".join(
        [row["question"].strip(), *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))]
    )
    return Problem(
        content_id("mmlu", question),
        ask(prompt, question),
        answer if isinstance(answer, str) else LETTERS[answer],
        "choice",
        domain=f"mmlu/{row['subject']}",
    )


def _spec(name: str, prompt: str, max_new_tokens: int, note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="mmlu",
        hub_id="cais/mmlu",
        config="all",
        split="test",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        columns=("question", "choices", "answer", "subject"),
        answer_type="choice",
        to_problem=to_problem,
        prompt=prompt,
        k=1,
        licence="MIT",
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens, forced=""),
        note=note,
    )


SPECS = (
    _spec("mmlu", FIRST_LETTER_PROMPT, 1, "14,042 questions, asked for the letter as the very next token"),
    _spec("mmlu_generated", CHOICE_PROMPT, 1024, "the same questions, answered in words and graded"),
)
