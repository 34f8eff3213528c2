"""What a backend made of a model, and what follows for its callers: who sees which tokens, and who must wait for whom.

Ranks that must run every forward together, each on tokens of its own, although their work differs in length.

Under ZeRO-3 and AutoEP a forward is a joint act of all ranks. A rank whose prompts are finished would leave the others
waiting for ever. Inside ``lockstep`` it keeps them company: it runs forwards on one token, thrown away, until all have finished.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_steer.hooks import call_hooks
from moe_steer.layers import decoder, unwrap

_ATTRIBUTE = "steering_layout"

_FLAG = "steering_lockstep"
_FINISHED, _DECODER, _MODEL = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on the ranks.

    ``same_tokens``: one model stretches over all ranks; each must be given the same tokens in the same order, sees the routing
    of all of them, and one rank's counts and samples are the whole result. Otherwise every rank has tokens of its own and
    results are summed over ranks.
    ``lockstep``: a forward is a joint act: when one rank runs it, all must (see ``moe_steer.backends.layout``).
    """

    backend: str = "plain"
    rank: int = 0
    world_size: int = 1
    same_tokens: bool = False
    lockstep: bool = False
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


def lockstep_is_on(model: Any) -> bool:
    """Whether ``lockstep`` is around the caller."""
    return getattr(model, _FLAG, False)


@contextmanager
def lockstep(model: Any) -> Iterator[None]:
    """Let every rank run as many forwards of ``model`` as it likes; leave together.

    Enter it on all ranks, and outside of ``steer`` and ``observe_routing``: the company is then neither steered nor counted.
    All ranks run the same thing inside, the whole model or its decoder alone. Does nothing for layouts that need no company.
    """
    layout = layout_of(model)
    if not layout.lockstep or layout.same_tokens or layout.world_size == 1 or lockstep_is_on(model):
        yield
        return
    inner = unwrap(model)
    body = decoder(inner)
    # NCCL sends from GPUs only; where the model's tensors lie says nothing, they may be offloaded.
    on_gpu = torch.cuda.is_available()
    state = _State(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    setattr(model, _FLAG, True)
    try:
        # First: ZeRO-3's own hook on the model already waits for the other ranks.
        with call_hooks(inner, state.enter_model, state.leave_model, first=True):
            with call_hooks(body, state.enter_decoder, state.ignore, first=True):
                yield
        _join_forward_passes(inner, body, state)
    finally:
        delattr(model, _FLAG)


class _State:
    """Announces each forward of this rank to the others, once, whichever module it enters first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside_model = False

    def announce(self, what: int) -> int:
        """Tell all ranks what this one does next; returns the most that any of them does."""
        flag = torch.tensor([what], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) if what == _FINISHED else what  # a rank with work of its own need not wait for the answer

    def enter_model(self, _: dict[str, Any]) -> None:
        self._inside_model = True
        self.announce(_MODEL)

    def leave_model(self, _: dict[str, Any], __: Any) -> None:
        self._inside_model = False

    def enter_decoder(self, _: dict[str, Any]) -> None:
        if not self._inside_model:
            self.announce(_DECODER)

    def ignore(self, _: dict[str, Any], __: Any) -> None:
        return


def _join_forward_passes(inner: Any, body: Any, state: _State) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=state.device)
    with torch.no_grad():
        while (what := state.announce(_FINISHED)) != _FINISHED:
            module = inner if what == _MODEL else body
            module(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
