"""OlympiadBench, open-ended English text problems in maths and physics (arXiv 2402.14008)."""

from __future__ import annotations

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import Row, TaskSpec, ask, listed


def to_problem(row: Row, prompt: str) -> Problem | None:
    """One final answer, or a list of them in any order; ``error`` is an absolute tolerance and becomes a relative one."""
    answers = [str(answer).strip().strip("$") for answer in row["final_answer"] or []]
    if not answers or not answers[0]:
        return None
    unit = str(row.get("unit") or "").strip().strip("$") or None
    numerical = str(row.get("answer_type", "")).startswith("Numerical")
    context = str(row.get("context") or "").strip()
    if row.get("is_multiple_answer") or len(answers) > 1:
        target, kind = listed(answers), "list"
    else:
        target, kind = answers[0], "quantity" if unit else "number" if numerical and row.get("error") else "expression"
    return Problem(
        f"olympiadbench-{row['id']}",
        ask(prompt, f"{context}\n\n{row['question']}".strip()),
        target,
        kind,
        unit=unit,
        domain=str(row.get("subfield") or "").lower() or None,
        tolerance=_relative(row.get("error"), answers[0]) if kind in ("number", "quantity") else None,
    )


def _relative(error: object, answer: str) -> float | None:
    try:
        absolute, value = float(str(error)), abs(float(answer.replace(",", "")))
    except ValueError:
        return None
    return min(absolute / value, 0.99) if value and absolute >= 0 else None


def _spec(name: str, config: str, note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="olympiadbench",
        hub_id="Hothan/OlympiadBench",
        config=config,
        split="train",
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
        columns=("id", "question", "final_answer", "is_multiple_answer", "unit", "answer_type", "error"),
        answer_type="expression, number, quantity or list",
        to_problem=to_problem,
        k=4,
        licence="Apache-2.0",
        note=note,
    )


SPECS = (
    _spec("olympiadbench_maths", "OE_TO_maths_en_COMP", "674 problems"),
    _spec("olympiadbench_physics", "OE_TO_physics_en_COMP", "236 problems; equations by rule are a lower bound"),
)
