"""The causal audit: derivatives for all experts, then the exact effects of the best of each sign, alone and as a coalition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from expert_stats.causes.causes_file import Causes, ExactEffect
from expert_stats.causes.log_gains import log_gain_gradients, outcomes_under
from expert_stats.causes.over_problems import mean_effect
from expert_stats.causes.readings import Reading
from expert_stats.evidence.sums import false_discovery_rate
from moe_steer.layers import model_shape
from moe_steer.plan import ExpertGain, SteeringPlan

Array = np.ndarray[Any, Any]
GAINS = (0.0, 0.5, 2.0, 8.0)
LEAST_SPLIT = 12
"""Fewer problems are not split: six are the least with which a sign-flip test can show anything."""
Watch = Callable[[str, Iterable[Any]], Iterable[Any]]


def find_causes(
    model: Any,
    readings: Sequence[Reading],
    *,
    outcome: Mapping[str, Any],
    wanted: str = "higher",
    each: int = 5,
    gains: Sequence[float] = GAINS,
    routers: Sequence[str] = ("free", "frozen"),
    coalition: int = 3,
    tokens_per_batch: int = 4096,
    share: tuple[int, int] = (0, 1),
    add: Callable[[Array], Array] = lambda part: part,
    watch: Watch = lambda label, items: items,
) -> Causes:
    """Derivatives over all problems; exact effects of the ``each`` best experts of each sign under ``gains`` (0 is ablation).

    With `LEAST_SPLIT` problems or more, one half (every second by name) chooses the experts, and the coalition's members and
    gains; the exact effects are of the other half, so that their intervals need not pay for the choice. ``routers``: see
    `outcomes_under`; the first of them is used for the coalition of at most ``coalition`` experts, which takes in one after the
    other whatever moves the outcome furthest to the ``wanted`` side (each at its best gain), and stops when nothing does.
    ``share``, ``add``: for ranks that deal the batches out, their share and the sum over ranks. ``watch(label, items)`` shows
    progress. ValueError for fewer than two problems, and for what `log_gain_gradients` refuses.
    """
    num = len({item.problem for item in readings})
    if num < 2:
        raise ValueError(f"the outcome is read from {num} problems: give at least 2, causes are averaged over problems")
    if wanted not in ("higher", "lower"):
        raise ValueError(f"wanted is {wanted!r}: choose higher or lower")

    def run(label: str, plans: Sequence[SteeringPlan], router: str, some: Sequence[Reading] = readings) -> Array:
        found = outcomes_under(
            model, some, plans, router=router, tokens_per_batch=tokens_per_batch, share=share, progress=lambda todo: watch(label, todo)
        )  # fmt: skip
        return add(found)

    found = log_gain_gradients(
        model,
        readings,
        tokens_per_batch=tokens_per_batch,
        share=share,
        progress=lambda todo: watch("derivatives", todo),
    )
    causes = Causes(
        model=model_shape(model).to_dict(),
        outcome=dict(outcome),
        wanted=wanted,
        problems=found.problems,
        value_P=add(found.value_P),
        gradient_PLE=add(found.gradient_PLE),
        selected_LE=add(found.selected_LE),
    )
    chosen_by, tested_on = split_problems(num)
    causes = dataclasses.replace(causes, tested_on=tuple(causes.problems[row] for row in tested_on))
    experts = best_of_each_sign(causes, each, chosen_by)
    single = [(expert, float(gain)) for expert in experts for gain in gains]
    if not single:
        return causes
    by_router = {}
    for router in routers:
        plans = [SteeringPlan(), *(_plan([one]) for one in single)]
        value_NP = run(f"gains, routers {router}", plans, router)
        by_router[router] = value_NP[1:] - value_NP[0]
    effects = _effects(
        [([one], router, difference_P[tested_on]) for router in routers for one, difference_P in zip(single, by_router[router], strict=True)]
    )  # fmt: skip
    steps = []
    if coalition:
        choosing = {causes.problems[row] for row in chosen_by}
        some = [item for item in readings if item.problem in choosing]
        steps = _greedy(
            single, by_router[routers[0]][:, chosen_by].mean(axis=1), wanted, coalition,
            lambda plans: _changes(run("coalition", plans, routers[0], some)),
        )  # fmt: skip
    measured = run("coalition", [SteeringPlan(), *map(_plan, steps)], routers[0]) if steps else np.zeros((1, num))
    differences = measured[1:] - measured[0]
    grown = [(step, routers[0], row[tested_on]) for step, row in zip(steps, differences, strict=True)]
    return dataclasses.replace(causes, effects=effects, coalition=_effects(grown))


def split_problems(num: int) -> tuple[list[int], list[int]]:
    """(rows that choose, rows that are tested): every second each; all for both with fewer than `LEAST_SPLIT`.

    >>> split_problems(3)
    ([0, 1, 2], [0, 1, 2])
    """
    rows = list(range(num))
    return (rows[::2], rows[1::2]) if num >= LEAST_SPLIT else (rows, rows)


def best_of_each_sign(causes: Causes, each: int, rows: Sequence[int]) -> list[tuple[int, int]]:
    """(layer, expert) of those that raise the outcome most surely, then of those that lower it most surely, over some problems."""
    ranking = causes.ranking(rows=np.array(rows))
    raising = [row for row in ranking if row.gradient > 0][:each]
    lowering = [row for row in ranking[::-1] if row.gradient < 0][:each]
    return [(row.layer, row.expert) for row in (*raising, *lowering)]


_Gained = tuple[tuple[int, int], float]
"""((layer, expert), gain)"""


def _plan(gained: Sequence[_Gained]) -> SteeringPlan:
    return SteeringPlan(experts=[ExpertGain(*expert, gain) for expert, gain in gained])


def _changes(value_NP: Array) -> Array:
    """Mean change of each plan after the first."""
    return np.asarray((value_NP[1:] - value_NP[0]).mean(axis=1))


def _greedy(
    single: Sequence[_Gained], change_N: Array, wanted: str, size: int, change_of: Callable[[list[SteeringPlan]], Array]
) -> list[list[_Gained]]:
    """The coalition after each step. ``change_of`` gives the mean change of each plan after the first, which is neutral."""
    sign = 1.0 if wanted == "higher" else -1.0
    best: dict[tuple[int, int], tuple[float, _Gained]] = {}
    for one, change in zip(single, sign * change_N, strict=True):
        if change > best.get(one[0], (0.0, one))[0]:
            best[one[0]] = (float(change), one)
    steps: list[list[_Gained]] = []
    reached = 0.0
    while len(steps) < size:
        taken = steps[-1] if steps else []
        left = [one for change, one in best.values() if one not in taken]
        if not left:
            break
        changes = sign * change_of([SteeringPlan(), *(_plan([*taken, one]) for one in left)])
        if float(changes.max()) <= reached:
            break
        reached = float(changes.max())
        steps.append([*taken, left[int(changes.argmax())]])
    return steps


def _effects(measured: Sequence[tuple[Sequence[_Gained], str, Array]]) -> tuple[ExactEffect, ...]:
    means = [mean_effect(difference_P) for _, _, difference_P in measured]
    q_N = false_discovery_rate(np.array([one.p for one in means]))
    return tuple(
        ExactEffect(
            experts=tuple(expert for expert, _ in gained),
            gains=tuple(gain for _, gain in gained),
            router=router,
            effect=one.effect,
            low=one.low,
            high=one.high,
            p=one.p,
            q=float(q),
            by_problem=tuple(difference_P.tolist()),
        )
        for (gained, router, difference_P), one, q in zip(measured, means, q_N, strict=True)
    )
