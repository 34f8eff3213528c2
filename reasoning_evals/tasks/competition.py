"""Competition and school mathematics.

- AIME 2024, 2025 and 2026: competition problems whose answers are integers from 0 to 999.
- MATH-500: the test problems that OpenAI's PRM800K held out from MATH (arXiv 2103.03874, 2305.20050).
- GSM8K: grade-school word problems with whole-number answers (arXiv 2110.14168).
- OlympiadBench: open-ended English text problems in maths and physics (arXiv 2402.14008).
"""

from __future__ import annotations

from collections.abc import Callable

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import NAME, NUMBER, Row, TaskSpec, ask, content_id, listed


def _mapping(year: int, id_column: str) -> Callable[[Row, str], Problem]:
    def aime_problem(row: Row, prompt: str) -> Problem:
        number = row[id_column]
        text = str(row["answer"]).strip()
        return Problem(
            f"aime{year}-{number}",
            ask(prompt, row["problem"]),
            text,
            "integer",
            cluster_id=_paper(row, year),
            domain="maths/aime",
        )

    return aime_problem


def _paper(row: Row, year: int) -> str:
    """The exam of the problem, if its address names it: problems of one exam are not independent."""
    address = str(row.get("url", ""))
    part = "II" if "AIME_II_" in address else "I" if "AIME_I_" in address else ""
    return f"aime{year}{part and '-' + part}"


def _aime_spec(year: int, hub_id: str, revision: str, split: str, id_column: str, licence: str) -> TaskSpec:
    return TaskSpec(
        name=f"aime{year}",
        family=f"aime{year}",
        hub_id=hub_id,
        split=split,
        revision=revision,
        columns={id_column: NAME, "problem": str, "answer": NAME},
        answer_type="integer",
        to_problem=_mapping(year, id_column),
        k=64,
        licence=licence,
        note="30 problems; the texts are third-party copyright",
    )


AIME = (
    _aime_spec(
        2024, "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", "id", "none stated"
    ),
    _aime_spec(
        2025,
        "MathArena/aime_2025",
        "c94da77eb22bbd6439e62a323bec18493a421302",
        "train",
        "problem_idx",
        "CC BY-NC-SA 4.0",
    ),
    _aime_spec(
        2026,
        "MathArena/aime_2026",
        "10b4e45b7a503075d4da8a0d57916a4f06ce6bd2",
        "train",
        "problem_idx",
        "CC BY-NC-SA 4.0",
    ),
)


def math500_problem(row: Row, prompt: str) -> Problem:
    return Problem(
        f"math500-{row['unique_id']}",
        ask(prompt, row["problem"]),
        row["answer"],
        "expression",
        domain=f"maths/{str(row['subject']).lower()}/level {row['level']}",
    )


MATH500 = (
    TaskSpec(
        name="math500",
        family="math500",
        hub_id="HuggingFaceH4/MATH-500",
        split="test",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        columns={"problem": str, "answer": NUMBER, "subject": str, "level": NAME, "unique_id": NAME},
        answer_type="expression",
        to_problem=math500_problem,
        k=4,
        licence="MIT (PRM800K)",
    ),
)


def gsm8k_problem(row: Row, prompt: str) -> Problem:
    """The target is the text after ``####``."""
    _, marker, target = row["answer"].rpartition("####")
    if not marker:
        raise ValueError(f"answer has no '####': {row['answer'][-40:]!r}")
    question = row["question"]
    return Problem(
        content_id("gsm8k", question),
        ask(prompt, question),
        target.strip().replace(",", ""),
        "integer",
        domain="maths/words",
    )


GSM8K = (
    TaskSpec(
        name="gsm8k",
        family="gsm8k",
        hub_id="openai/gsm8k",
        config="main",
        split="test",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        columns={"question": str, "answer": str},
        answer_type="integer",
        to_problem=gsm8k_problem,
        k=1,
        licence="MIT",
    ),
)


def olympiadbench_problem(row: Row, prompt: str) -> Problem | None:
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


def _olympiadbench_spec(name: str, config: str, note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="olympiadbench",
        hub_id="Hothan/OlympiadBench",
        config=config,
        split="train",
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
        columns={
            "id": NAME,
            "question": str,
            "final_answer": list[NUMBER] | None,
            "is_multiple_answer": bool | None,
            "unit": str | None,
            "answer_type": str | None,
            "error": NUMBER | None,
        },
        answer_type="expression, number, quantity or list",
        to_problem=olympiadbench_problem,
        k=4,
        licence="Apache-2.0",
        note=note,
    )


OLYMPIADBENCH = (
    _olympiadbench_spec("olympiadbench_maths", "OE_TO_maths_en_COMP", "674 problems"),
    _olympiadbench_spec(
        "olympiadbench_physics", "OE_TO_physics_en_COMP", "236 problems; equations by rule are a lower bound"
    ),
)
