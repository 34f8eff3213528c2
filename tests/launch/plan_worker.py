"""What ranks do when the plan is not the same everywhere. Usage: plan_worker.py OUT, on every rank."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from launch.core import wiring
from launch.core.ranks import Ranks, leave, ranks_of_this_run
from launch.core.wiring import broadcast_plan
from moe_steer.plan import ExpertGain, ResidualVector, SteeringPlan


def said(work: Callable[[], object]) -> str:
    """What a ValueError says; "" where there is none."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def cases(ranks: Ranks, folder: Path) -> dict[str, str]:
    """Name -> what this rank was told."""
    vector = folder / "vector.safetensors"
    if ranks.is_main:
        save_file({"vector": torch.arange(8.0)}, str(vector))
    ranks.barrier()
    plan = SteeringPlan(
        experts=[ExpertGain(2, 3, 4.0)], residual=[ResidualVector(layer=1, file=str(vector), strength=0.5)]
    )
    own = dataclasses.replace(plan, experts=[ExpertGain(2, 3, 4.0 + ranks.rank)])
    result = {
        "own plans": said(lambda: ranks.assert_same("the steering plan", own.digest())),
        "one plan": said(lambda: ranks.assert_same("the steering plan", plan.digest())),
    }
    received = broadcast_plan(own if ranks.is_main else None, ranks)
    result["received"] = received.digest()
    result["rank 0's"] = dataclasses.replace(own, experts=[ExpertGain(2, 3, 4.0)]).digest()
    unpack = wiring._unpack

    def torn(data: dict[str, object], vectors: list[bytes]) -> SteeringPlan:
        arrived = unpack(data, vectors)
        return dataclasses.replace(arrived, experts=()) if ranks.rank == 1 else arrived

    wiring._unpack = torn
    result["torn on its way"] = said(lambda: broadcast_plan(plan if ranks.is_main else None, ranks))
    return result


def main() -> None:
    """Write what this rank was told to OUT/rank<k>.json."""
    folder = Path(sys.argv[1])
    with ranks_of_this_run() as ranks:
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(cases(ranks, folder)))


if __name__ == "__main__":
    main()
    leave(0)
