"""Trains the dense lab model: `python -m launch.lab.train_dense --work DIR [--out DIR]`, one thread, resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.lab.batches import overthinking_text
from launch.lab.card import DENSE_CARD
from launch.lab.models import new_dense_model
from launch.lab.train import Options, Recipe, Subject, publish, train_from
from moe_steer.lab import LAB_DENSE

MAX_SEQUENCE = 384

DENSE_LAB = Subject(
    new_model=new_dense_model,
    write=overthinking_text,
    max_sequence=MAX_SEQUENCE,
    tokens_per_batch=2000,
    card=DENSE_CARD,
)


RECIPE = Recipe(
    steps=7800, learning_rate=3e-3, balance_rate=0.0, check_rates=((0, 0.1), (4992, 1.0)), tokenizer_samples=20_000
)
"""The first 4,992 steps are on short thoughts with a tenth of the checks; then the solutions overthink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseOptions(Options):
    """Train the embedded dense model."""

    out: Path = LAB_DENSE
    """Folder the finished checkpoint is written to."""
    recipe: Recipe = RECIPE


if __name__ == "__main__":
    asked = tyro.cli(DenseOptions)
    publish(asked, DENSE_LAB, *train_from(asked, DENSE_LAB))
