"""Decoding rules that papers compare steering with, as transformers' LogitsProcessors without memory of their own."""

from reasoning_evals.decoding.forms import Tags
from reasoning_evals.decoding.processors import Ban, SwitchPenalty, ThinkingBudget

__all__ = ["Ban", "SwitchPenalty", "Tags", "ThinkingBudget"]
