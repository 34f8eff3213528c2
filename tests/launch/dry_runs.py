"""The dry run of every shipped recipe, made once a process: several tests look at each, and one takes seconds."""

from __future__ import annotations

from functools import cache

from launch.recipes import DryRun, dry_run, load_recipe


@cache
def dry_run_of(name: str) -> DryRun:
    """What ``python -m launch.recipes NAME`` finds where no plan.json lies in the folder."""
    return dry_run(load_recipe(name))
