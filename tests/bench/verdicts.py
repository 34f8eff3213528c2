"""Are verdicts, bounds, intervals and named effects what they claim to be? The worlds of tests/reasoning_evals/verdict_worlds.py, long.

    OMP_NUM_THREADS=1 python tests/bench/verdicts.py [--runs 1000] [--only error pair named shown held length]

Prints one table: the claim, the world, what was measured with its standard error, what is allowed, and the rule that it replaced in
the same world. Exit code 1 where a claim fails by more than two standard errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reasoning_evals"))

from test_verdict_worlds import linearised, t_formula
from verdict_worlds import (
    HARD,
    MIXED,
    SETTLED,
    called_held,
    covered_lengths,
    family_wise_error,
    one_pair,
    power_at_the_named_effect,
    power_of_a_shown_effect,
    se,
)

Row = tuple[str, str, float, float, float, str, int]
"""Claim, world, measured, least, most, the old rule's number, runs."""


def error(runs: int) -> Iterator[Row]:
    for num, k, arms in ((30, 8, 8), (100, 4, 8), (30, 8, 3)):
        found, _ = family_wise_error(num, k, arms, runs, seed=1)
        old, _ = family_wise_error(num, k, arms, max(1, runs // 4), seed=1, judge=lambda p_values: p_values)
        yield "false verdict in a run", f"{arms} null arms, {num} x {k}", found, 0, 0.05, f"{old:.3f}", runs


def pair(runs: int) -> Iterator[Row]:
    for num, k in ((30, 16), (60, 8), (100, 4), (30, 1)):
        wrong, covered = one_pair(num, k, runs, seed=2)
        yield "false verdict, one pair", f"{num} x {k}", wrong, 0, 0.05, "same", runs
        yield "interval covers, one pair", f"{num} x {k}", covered, 0.93, 0.97, "same", runs


def named(runs: int) -> Iterator[Row]:
    for shape, name in ((MIXED, "mixed rates"), (SETTLED, "settled rates"), (HARD, "30% right")):
        for num, k in ((50, 1), (100, 1), (30, 2), (60, 2), (200, 2), (30, 4), (60, 4), (400, 4), (30, 8), (60, 16)):
            ours = power_at_the_named_effect(num, k, runs, seed=3, shape=shape)
            old = power_at_the_named_effect(num, k, max(1, runs // 3), seed=3, named=t_formula, shape=shape)
            yield "power at the named effect", f"{num} x {k}, {name}", ours, 0.77, 0.86, f"{old:.3f}", runs
    ours = power_at_the_named_effect(60, 4, runs, seed=3, num_arms=8)
    yield "power at the named effect", "60 x 4, mixed rates, one of 8 arms", ours, 0.77, 0.86, "", runs


def shown(runs: int) -> Iterator[Row]:
    for num, k, effect in ((50, 1, 0.15), (50, 4, 0.05), (100, 4, 0.05), (50, 16, 0.03)):
        said, again = power_of_a_shown_effect(num, k, effect, max(1, runs // 2), seed=6)
        world = f"{num} x {k}, true effect {100 * effect:g} points: {said:.2f} is said"
        yield "power of a shown effect", world, again, said - 0.06, said + 0.04, "", max(1, runs // 2)


def held(runs: int) -> Iterator[Row]:
    for num, k, losers, loss in (
        (30, 4, 0.03, 1.0), (60, 4, 0.03, 1.0), (100, 4, 0.03, 1.0), (200, 3, 0.03, 1.0), (400, 4, 0.03, 1.0),
        (30, 4, 0.1, 0.3), (100, 4, 0.1, 0.3), (200, 4, 0.1, 0.3),
    ):  # fmt: skip
        for noise in (0.0, 0.05, 0.3):
            ours = called_held(num, k, losers, loss, runs, seed=4, noise=noise)
            old = called_held(num, k, losers, loss, runs, seed=4, noise=noise, low=lambda found: found.low)
            world = f"{num} x {k}, {losers:.0%} lose {loss:.0%}, {noise:.0%} unsettled"
            yield "held at 3.0 points lost", world, ours, 0, 0.05, f"{old:.3f}", runs


def length(runs: int) -> Iterator[Row]:
    for clusters, size, sd, k in (
        (10, 4, 0.5, 1), (10, 4, 1.3, 1), (30, 4, 1.3, 1), (30, 1, 1.3, 1), (30, 1, 1.0, 4), (100, 1, 1.3, 1), (60, 1, 0.5, 8),
    ):  # fmt: skip
        ours = covered_lengths(clusters, size, sd, runs, seed=5, k=k)
        old = covered_lengths(clusters, size, sd, runs, seed=5, k=k, interval=linearised)
        world = f"{clusters} clusters of {size}" if size > 1 else f"{clusters} problems"
        yield "length ratio covers", f"{world} x {k}, lognormal sd {sd}", ours, 0.93, 0.97, f"{old:.3f}", runs


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "error": error, "pair": pair, "named": named, "shown": shown, "held": held, "length": length,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    failed = 0
    print(f"{'claim':27} {'world':44} {'measured':>16}  {'allowed':>12}  {'old rule':>8}")
    for name in options.only:
        for claim, world, found, least, most, old, runs in PARTS[name](options.runs):
            slack = 2 * se(most if found > most else least, runs)
            fails = not least - slack <= found <= most + slack
            failed += fails
            allowed = f"{least:.2f} to {most:.2f}" if least else f"<= {most:.2f}"
            print(
                f"{claim:27} {world:44} {found:6.3f} +- {se(found, runs):.3f}  {allowed:>12}  {old:>8}{'  FAILS' if fails else ''}",
                flush=True,
            )
    print(f"{failed} claims fail")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
