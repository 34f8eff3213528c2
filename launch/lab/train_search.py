"""Trains the lab model whose thinking pays: `python -m launch.lab.train_search --work DIR [--out DIR]`, one thread, resumable.

In two stages: bare verdicts first, as short texts teach the calculations quickly; then verdicts that compare digit by digit, without
which a model of this size does not tell right from wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import tyro

from launch.lab.batches import search_text
from launch.lab.card import SEARCH_CARD
from launch.lab.models import new_search_model
from launch.lab.train import Options, Recipe, Subject, publish, train_from
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
BARE_LAB = replace(SEARCH_LAB, write=partial(search_text, spelled=False))

BARE_RECIPE = Recipe(steps=3840, learning_rate=3e-3, check_rates=((0, 0.2), (2304, 1.0)), tokenizer_samples=8000)
"""The first 2,304 steps are on short thoughts with a fifth of the checks."""
RECIPE = Recipe(steps=1152, seed=1, learning_rate=1.5e-3, warmup_steps=40, balance_rate=1e-3, check_rates=((0, 1.0),))


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions(Options):
    """Train the embedded model whose thinking pays."""

    out: Path = LAB_SEARCH
    """Folder the finished checkpoint is written to."""
    recipe: Recipe = RECIPE
    """Of the second stage."""
    bare_recipe: Recipe = field(default_factory=lambda: BARE_RECIPE)
    """Of the first stage."""


def main() -> None:
    options = tyro.cli(SearchOptions)
    bare = options.work / "bare"
    model, tokenizer = train_from(replace(options, work=bare, recipe=options.bare_recipe), BARE_LAB)
    tokenizer.save_pretrained(options.work / "tokenizer")
    spelled = replace(SEARCH_LAB, new_model=lambda *_: model)
    publish(options, spelled, *train_from(options, spelled), {bare: options.bare_recipe})


if __name__ == "__main__":
    main()
