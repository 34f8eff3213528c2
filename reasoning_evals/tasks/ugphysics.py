"""UGPhysics: undergraduate physics in thirteen subjects (arXiv 2502.00334)."""

from __future__ import annotations

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import Row, TaskSpec, ask, content_id, listed

_TYPES = {"NV": "number", "MC": "choice", "TF": "choice"}


def to_problem(row: Row, prompt: str) -> Problem | None:
    """Numerical values become numbers or quantities, expressions and equations expressions, several answers a list."""
    answers = [answer.strip().strip("$") for answer in _answers(row["answers"])]
    answers = [answer for answer in answers if answer]
    if not answers:
        return None
    unit = str(row.get("unit") or "").strip().strip("$") or None
    kind = _TYPES.get(str(row["answer_type"]).strip(), "expression")
    kind = "quantity" if kind == "number" and unit else kind
    several = bool(row.get("is_multiple_answer")) or len(answers) > 1
    return Problem(
        content_id("ugphysics", row["problem"]),
        ask(prompt, row["problem"]),
        listed(answers) if several else answers[0],
        "list" if several else kind,
        unit=unit if kind == "quantity" else None,
        domain=f"physics/{str(row.get('subject') or '').lower()}",
    )


def _answers(answers: object) -> list[str]:
    return [str(answer) for answer in answers] if isinstance(answers, list) else [str(answers or "")]


SPECS = (
    TaskSpec(
        name="ugphysics",
        family="ugphysics",
        hub_id="UGPhysics/ugphysics",
        split="en",
        revision="523e71bc4e33356bb19de4af38c128796e8a8770",
        columns=("problem", "answers", "answer_type", "unit", "is_multiple_answer"),
        answer_type="number, quantity, expression, choice or list",
        to_problem=to_problem,
        k=1,
        licence="CC BY-NC-SA 4.0",
        note="one configuration a subject: give config=; expressions by rule are a lower bound",
    ),
)
