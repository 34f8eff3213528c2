"""GPQA-Diamond: graduate questions in physics, chemistry and biology (arXiv 2311.12022)."""

from __future__ import annotations

from collections.abc import Callable

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.options import LETTERS, shuffled, with_options
from reasoning_evals.tasks.spec import CHOICE_PROMPT, Row, TaskSpec, ask

_ANSWERS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def to_problem(row: Row, prompt: str) -> Problem:
    """The four answers in an order drawn from the record's id."""
    options = [str(row[name]) for name in _ANSWERS]
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
    return lambda row, prompt: to_problem(row, prompt) if row["High-level domain"] == domain else None


def _spec(name: str, mapping: Callable[[Row, str], Problem | None], note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="gpqa",
        hub_id="Idavidrein/gpqa",
        config="gpqa_diamond",
        split="train",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        columns=("Question", *_ANSWERS, "High-level domain", "Subdomain", "Record ID"),
        answer_type="choice",
        to_problem=mapping,
        prompt=CHOICE_PROMPT,
        k=8,
        licence="CC BY 4.0",
        publish_items=False,
        note=note,
    )


SPECS = (
    _spec("gpqa_diamond", to_problem, "198 questions; gated: accept its terms on the hub first"),
    _spec("gpqa_diamond_physics", _of_domain("Physics"), "86 questions"),
    _spec("gpqa_diamond_chemistry", _of_domain("Chemistry"), "93 questions"),
    _spec("gpqa_diamond_biology", _of_domain("Biology"), "19 questions"),
)
