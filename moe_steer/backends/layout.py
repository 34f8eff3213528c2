"""How a model is distributed over ranks, and what follows for callers: which rank sees which tokens, and who waits for whom.

Under ZeRO-3 and AutoEP a forward is a collective operation: every rank must take part, each with its own tokens. But ranks have
different amounts of work, and one that finishes early would leave the others waiting forever. ``lockstep`` solves this: a rank
that has finished keeps joining the forwards of the others with one dummy token, until all have finished.

Before each forward, every rank announces what it does next in an all-reduce (maximum): 2 the whole model, 1 the decoder only, 0
finished. A finished rank learns from the result which module to join; if all announce 0, the block ends everywhere.
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

GPU_SHARE = 0.92
"""Part of a GPU that tensors may fill; the rest is left to the CUDA context, the communication library and fragmentation."""
FEWER = "a smaller batch or context"
"""In advice about memory: what every command has options of its own for."""
FITS = "the fastest that fits"
"""In the reason for a backend that memory was planned for."""
_FLAG = "steering_lockstep"
_FINISHED, _DECODER, _MODEL = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is distributed over the ranks.

    ``same_tokens``: all ranks together hold one model; each must get the same tokens in the same order and sees the routing
    of all of them, and the counts and samples of one rank are the whole result. Otherwise every rank has its own tokens,
    and results are summed over ranks. ``lockstep``: a forward is collective: when one rank runs it, all must (see the
    module's docstring). ``engine``: never read; the model's weights live as long as it does.
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
        """Whether the samples and counts of this rank go into the results, so that each counts exactly once."""
        return self.rank == 0 or not self.same_tokens


def local_ranks(world_size: int) -> int:
    """Number of this run's ranks on this machine, from the launcher's environment; else all."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size))


def available_bytes(world_size: int) -> tuple[int, str]:
    """(bytes that one rank may use on this machine, which memory that is): a GPU's, or its share of the CPU's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * GPU_SHARE), "GPU memory"
    return host_bytes(world_size), "this rank's part of the CPU memory"


def gpus_here() -> tuple[int, ...]:
    """Bytes that tensors may fill on each GPU of this machine."""
    found = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return tuple(int(size * GPU_SHARE) for size in found)


def host_bytes(world_size: int) -> int:
    """Bytes of this machine's CPU memory that one of its ranks may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * GPU_SHARE) // local_ranks(world_size)


def gib(number: int) -> str:
    """Bytes as text in GiB."""
    value = number / 2**30
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


@contextmanager
def failing_together() -> Iterator[None]:
    """What one rank refuses inside the block, all refuse: the others would wait in the next collective for a rank that is gone."""
    own: ValueError | None = None
    try:
        yield
    except ValueError as error:
        own = error
    said: list[str] = [str(own or "")]
    if dist.is_initialized() and dist.get_world_size() > 1:
        said *= dist.get_world_size()
        dist.all_gather_object(said, str(own or ""))
    if first := next(filter(None, said), ""):
        raise ValueError(first) from own


def layout_of(model: Any) -> Layout:
    """The layout that ``load_model`` recorded; for other models, the whole model on every rank of the run."""
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
    """Whether the caller is inside ``lockstep(model)``."""
    return getattr(model, _FLAG, False)


@contextmanager
def lockstep(model: Any) -> Iterator[None]:
    """Let each rank run any number of forwards of ``model``; all ranks leave the block together.

    Enter it on all ranks, outside of ``steer`` and ``observe_routing``: the dummy forwards are then neither steered nor
    counted. Inside, all ranks run the same module, the whole model or only its decoder. Does nothing for layouts without
    lockstep.
    """
    layout = layout_of(model)
    if not layout.lockstep or layout.same_tokens or layout.world_size == 1 or lockstep_is_on(model):
        yield
        return
    inner = unwrap(model)
    body = decoder(inner)
    # NCCL needs GPU tensors; the model's tensors do not tell the device, since they may be offloaded.
    on_gpu = torch.cuda.is_available()
    state = _State(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    setattr(model, _FLAG, True)
    try:
        # Our hook must come first: ZeRO-3's own hook on the model already waits for the other ranks.
        with call_hooks(inner, state.enter_model, state.leave_model, first=True):
            with call_hooks(body, state.enter_decoder, state.ignore, first=True):
                yield
        _join_forward_passes(inner, body, state)
    finally:
        delattr(model, _FLAG)


class _State:
    """Announces each forward of this rank to the others once, whether it enters the model or the decoder first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside_model = False

    def announce(self, what: int) -> int:
        """Tell all ranks what this one does next; returns the most that any of them does."""
        flag = torch.tensor([what], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # Reading the flag waits for the device, so a rank with work, which does not need it, leaves it unread.
        return int(flag) if what == _FINISHED else what

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
