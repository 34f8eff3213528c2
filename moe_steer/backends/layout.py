"""What a backend made of a model, and what follows for its callers: who sees which tokens, and who must wait for whom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

_ATTRIBUTE = "steering_layout"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on the ranks.

    ``same_tokens``: one model stretches over all ranks; each must be given the same tokens in the same order, sees the routing
    of all of them, and one rank's counts and samples are the whole result. Otherwise every rank has tokens of its own and
    results are summed over ranks.
    ``in_step``: a forward is a joint act: when one rank runs it, all must (see ``moe_steer.backends.in_step``).
    """

    backend: str = "plain"
    rank: int = 0
    world_size: int = 1
    same_tokens: bool = False
    in_step: bool = False
    reason: str = ""
    engine: Any = None

    @property
    def share(self) -> tuple[int, int]:
        """(index, number) of this rank's share of the problems: items index, index + number, index + 2 * number, ..."""
        return (0, 1) if self.same_tokens else (self.rank, self.world_size)

    @property
    def writes(self) -> bool:
        """Whether what this rank sampled and counted goes into the results: exactly once over all ranks."""
        return self.rank == 0 or not self.same_tokens


def local_ranks(world_size: int) -> int:
    """How many of a run's ranks are on this machine: what the launcher says, else all."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size))


def layout_of(model: Any) -> Layout:
    """The layout that ``load_model`` recorded; for any other model, the whole model on every rank of the run."""
    layout = getattr(model, _ATTRIBUTE, None)
    if layout is not None:
        return layout
    if dist.is_available() and dist.is_initialized():
        return Layout(rank=dist.get_rank(), world_size=dist.get_world_size())
    return Layout()


def remember_layout(model: Any, layout: Layout) -> None:
    """Record the layout with the model. It also keeps the engine alive as long as the model."""
    setattr(model, _ATTRIBUTE, layout)
