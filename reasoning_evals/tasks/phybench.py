"""PHYBench: original physics problems with one LaTeX formula as answer (arXiv 2504.16074)."""

from __future__ import annotations

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import Row, TaskSpec, ask


def to_problem(row: Row, prompt: str) -> Problem | None:
    """The 400 problems without a published answer are left out."""
    answer = str(row["answer"] or "").strip().strip("$").strip()
    if not answer:
        return None
    return Problem(
        f"phybench-{row['id']}",
        ask(prompt, row["content"]),
        answer,
        "expression",
        domain=f"physics/{str(row.get('tag') or '').lower()}",
    )


SPECS = (
    TaskSpec(
        name="phybench",
        family="phybench",
        hub_id="Eureka-Lab/PHYBench",
        split="train",
        revision="d6d91c787b7abb865eb2490a328bf85a9f5095f0",
        data_file="PHYBench-questions_v1.json",  # the other files hold parts of it again
        columns=("id", "content", "answer"),
        answer_type="expression",
        to_problem=to_problem,
        k=4,
        licence="MIT",
        note="100 problems with answers; formulas by rule are a lower bound",
    ),
)
