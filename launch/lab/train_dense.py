"""Trains the dense lab model: `python -m launch.lab.train_dense --work DIR [--out DIR]`, one thread, resumable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from launch.lab.batches import overthinking_text
from launch.lab.card import DENSE_CARD, write_card
from launch.lab.models import MAX_NEW_TOKENS, new_dense_model
from launch.lab.scoring import evaluate_model, export_model
from launch.lab.train import Options, Recipe, Subject, train_from
from moe_steer.lab import LAB_DENSE

MAX_SEQUENCE = 384

DENSE_LAB = Subject(
    new_model=new_dense_model, write=overthinking_text, max_sequence=MAX_SEQUENCE, tokens_per_batch=2000
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


def main() -> None:
    options = tyro.cli(DenseOptions)
    model, tokenizer = train_from(options, DENSE_LAB)
    export_model(model, tokenizer, options.out)
    scores = evaluate_model(options.out, options.problems_per_family, options.samples, max_new_tokens=MAX_NEW_TOKENS)
    (options.work / "scores.json").write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
    write_card(options.out, options.work / "loss.jsonl", scores, asdict(options.recipe), DENSE_CARD)


if __name__ == "__main__":
    main()
