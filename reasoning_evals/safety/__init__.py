"""Answers that no grader decides: a classifier's verdicts, defence rates, fluency."""

from reasoning_evals.safety.defence import (
    Defence,
    DefencePair,
    compare_defence,
    defence_of,
    n_gram_entropy,
    text_fluency,
)
from reasoning_evals.safety.verdicts import LabelJudge, TextScore

__all__ = [
    "Defence",
    "DefencePair",
    "LabelJudge",
    "TextScore",
    "compare_defence",
    "defence_of",
    "n_gram_entropy",
    "text_fluency",
]
