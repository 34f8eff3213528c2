"""Ranks that must run every forward together, each on tokens of its own, although their work differs in length.

Under ZeRO-3 and AutoEP a forward is a joint act of all ranks. A rank whose prompts are finished would leave the others
waiting for ever. Inside ``in_step`` it keeps them company: it runs forwards on one token, thrown away, until all have finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moe_steer.backends.layout import layout_of
from moe_steer.hooks import call_hooks
from moe_steer.layers import decoder, unwrap

_FLAG = "steering_in_step"
_FINISHED, _DECODER, _MODEL = 0, 1, 2


def in_step_is_on(model: Any) -> bool:
    """Whether ``in_step`` is around the caller."""
    return getattr(model, _FLAG, False)


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Let every rank run as many forwards of ``model`` as it likes; leave together.

    Enter it on all ranks, and outside of ``steer`` and ``observe_routing``: the company is then neither steered nor counted.
    All ranks run the same thing inside, the whole model or its decoder alone. Does nothing for layouts that need no company.
    """
    layout = layout_of(model)
    if not layout.in_step or layout.same_tokens or layout.world_size == 1 or in_step_is_on(model):
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
        _keep_company(inner, body, state)
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


def _keep_company(inner: Any, body: Any, state: _State) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=state.device)
    with torch.no_grad():
        while (what := state.announce(_FINISHED)) != _FINISHED:
            module = inner if what == _MODEL else body
            module(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
