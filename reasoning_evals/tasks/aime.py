"""AIME 2024, 2025 and 2026: competition problems whose answers are integers from 0 to 999."""

from __future__ import annotations

from collections.abc import Callable

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import Row, TaskSpec, ask


def _mapping(year: int, id_column: str) -> Callable[[Row, str], Problem]:
    def to_problem(row: Row, prompt: str) -> Problem:
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

    return to_problem


def _paper(row: Row, year: int) -> str:
    """The exam that the problem is from, where its address says so: problems of one paper are no independent draws."""
    address = str(row.get("url", ""))
    part = "II" if "AIME_II_" in address else "I" if "AIME_I_" in address else ""
    return f"aime{year}{part and '-' + part}"


def _spec(year: int, hub_id: str, revision: str, split: str, id_column: str, licence: str) -> TaskSpec:
    return TaskSpec(
        name=f"aime{year}",
        family=f"aime{year}",
        hub_id=hub_id,
        split=split,
        revision=revision,
        columns=(id_column, "problem", "answer"),
        answer_type="integer",
        to_problem=_mapping(year, id_column),
        k=64,
        licence=licence,
        note="30 problems; the texts are third-party copyright",
    )


SPECS = (
    _spec(2024, "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", "id", "none stated"),
    _spec(
        2025,
        "MathArena/aime_2025",
        "c94da77eb22bbd6439e62a323bec18493a421302",
        "train",
        "problem_idx",
        "CC BY-NC-SA 4.0",
    ),
    _spec(
        2026,
        "MathArena/aime_2026",
        "10b4e45b7a503075d4da8a0d57916a4f06ce6bd2",
        "train",
        "problem_idx",
        "CC BY-NC-SA 4.0",
    ),
)
