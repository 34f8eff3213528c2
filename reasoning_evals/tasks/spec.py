"""What a task is: where its problems come from, how they are asked, how they are graded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoning_evals.problems import Problem

Row = Mapping[str, Any]

R1_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""The user turn of the DeepSeek-R1 protocol: no system prompt, no examples."""
CHOICE_PROMPT = "{problem}\n\nPlease reason step by step, and put the letter of the right option within \\boxed{{}}."
QUANTITY_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer, in {unit}, within \\boxed{{}}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a task is sampled unless the user says otherwise: the protocol of DeepSeek-R1 (arXiv 2501.12948, section 3)."""

    temperature: float = 0.6
    """0 is the most likely token at each step."""
    top_p: float = 0.95
    max_new_tokens: int = 32_768
    forced: str = "<think>\n"
    """What the answer is made to begin with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """One data set, or one part of it, as a task."""

    name: str
    family: str
    """Name of the data set's folder under ``data_dir``."""
    hub_id: str
    config: str | None = None
    """Configuration on the hub; None is the default one."""
    split: str
    revision: str | None = None
    """Commit of the hub's repository; None has to be given by the caller, so that no result rests on a moving target."""
    data_file: str | None = None
    """The one file of that repository that holds the rows, where loading all of its files would repeat them."""
    file_name: str | None = None
    """Name of a split's file, with {split} in it, where the data set has other files that look like it."""
    columns: tuple[str, ...]
    """Columns that a row must have."""
    answer_type: str
    """The type of its answers, in words where they differ."""
    to_problem: Callable[[Row, str], Problem | None]
    """Row and prompt template to problem; None for a row that the task leaves out (pictures, no answer)."""
    prompt: str = R1_PROMPT
    k: int
    """Samples a problem."""
    licence: str
    publish_items: bool = True
    """False where the authors ask that no problem be published: reports leave the texts out."""
    sampling: Sampling = field(default_factory=Sampling)
    note: str = ""

    @property
    def terms(self) -> str:
        """Licence and note, as one line."""
        return f"licence: {self.licence}" + (f" ({self.note})" if self.note else "")


def content_id(name: str, text: str) -> str:
    """An id from the problem's own text, for data sets that have none: the same in every file and order.

    >>> content_id("gsm8k", "How many?")
    'gsm8k-ba352e24c6'
    """
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def ask(template: str, problem: str, **values: str) -> str:
    """The user turn of a problem."""
    return template.format(problem=problem.strip().lstrip("\ufeff").strip(), **values)


def listed(answers: Sequence[str]) -> str:
    """Several answers as the target of a list in any order."""
    return "{" + "; ".join(answers) + "}"
