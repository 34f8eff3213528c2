"""The description of a task: the source of its problems, its prompt, its answer type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from moe_steer.json_files import quoted
from reasoning_evals.problems import Problem

Row = Mapping[str, Any]

ANY = object
NAME = str | int
NUMBER = str | int | float
"""Kinds of columns; also an answer that a file may hold as a number."""

R1_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""The user turn of the DeepSeek-R1 protocol: no system prompt, no examples."""
CHOICE_PROMPT = "{problem}\n\nPlease reason step by step, and put the letter of the right option within \\boxed{{}}."
QUANTITY_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer, in {unit}, within \\boxed{{}}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Default sampling of a task: the protocol of DeepSeek-R1 (arXiv 2501.12948, section 3)."""

    temperature: float = 0.6
    """0: the most likely token at each step."""
    top_p: float = 0.95
    max_new_tokens: int = 32_768


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
    """Commit of the hub's repository; None: the caller must give one, because results on a moving revision cannot be repeated."""
    data_file: str | None = None
    """The one file of that repository with the rows, where loading all its files would repeat them."""
    file_name: str | None = None
    """Name of a split's file, with {split} in it, where the data set has similar files."""
    columns: Mapping[str, Any]
    """Columns that a row must have, and what each holds, as ``check_types`` takes it; ``ANY`` is checked elsewhere."""
    answer_type: str
    """The type of its answers; a description where it varies."""
    to_problem: Callable[[Row, str], Problem | None]
    """Row and prompt template to problem; None for a row that the task skips (pictures, no answer)."""
    prompt: str = R1_PROMPT
    k: int
    """Samples a problem."""
    licence: str
    publish_items: bool = True
    """False where the authors ask not to publish problems: reports omit the texts."""
    sampling: Sampling = field(default_factory=Sampling)
    note: str = ""

    @property
    def terms(self) -> str:
        """Licence and note, as one line."""
        return f"licence: {self.licence}" + (f" ({self.note})" if self.note else "")


def content_id(name: str, text: str) -> str:
    """An id made from the problem's text, for data sets without ids: independent of file and order.

    >>> content_id("gsm8k", "How many?")
    'gsm8k-ba352e24c6'
    """
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def ask(template: str, problem: str, **values: str) -> str:
    """The user turn of a problem; ValueError for a template that has no place for it, or other single braces."""
    try:
        places = [name for _, name, _, _ in Formatter().parse(template)]
        asked = template.format(problem=problem.strip().lstrip("\ufeff").strip(), **values)
    except (LookupError, ValueError, AttributeError):
        places = []
    if "problem" not in places:
        raise ValueError(
            f"the prompt {quoted(template)} is no template: write {{problem}} where the question goes, and other braces twice"
        )
    return asked


def listed(answers: Sequence[str]) -> str:
    """Several answers as the target of a list in any order."""
    return "{" + "; ".join(answers) + "}"
