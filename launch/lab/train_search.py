"""Trains the lab model whose thinking pays: `python -m launch.lab.train_search --work DIR [--out DIR]`, one thread, resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.lab.batches import search_text
from launch.lab.card import SEARCH_CARD
from launch.lab.models import new_search_model
from launch.lab.train import Options, Recipe, Subject, train_and_publish
from moe_steer.lab import LAB_SEARCH
from moe_steer.lab.problems import SEARCH_FAMILIES

SEARCH_LAB = Subject(
    new_model=new_search_model,
    write=search_text,
    max_sequence=504,
    tokens_per_batch=1800,
    families=SEARCH_FAMILIES,
    card=SEARCH_CARD,
)

RECIPE = Recipe(steps=3840, learning_rate=3e-3, check_rates=((0, 0.2), (2304, 1.0)), tokenizer_samples=8000)
"""The first 2,304 steps are on short thoughts with a fifth of the checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions(Options):
    """Train the embedded model whose thinking pays."""

    out: Path = LAB_SEARCH
    """Folder the finished checkpoint is written to."""
    recipe: Recipe = RECIPE


if __name__ == "__main__":
    train_and_publish(tyro.cli(SearchOptions), SEARCH_LAB)
