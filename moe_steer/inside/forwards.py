"""Modules whose forward is another inside a with-block: run twice, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import update_wrapper
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block each given module keeps only its input for the backward pass and runs once more there (checkpointing;
    Chen et al., arXiv 1604.06174). In evaluation mode too, where the library's own switch does nothing.

    The backward pass must be inside the block, and inside that of every hook: what the modules call is called again.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced_forward(module, _run_twice(module.forward)))
        yield


@contextmanager
def replaced_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block ``module`` returns ``output`` without running."""
    with _replaced_forward(module, lambda *_, **__: output):
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = "forward" in vars(module)  # accelerate has put one there
    before = module.forward
    # The signature is read by callers (the library filters arguments by it), so it stays.
    module.forward = update_wrapper(forward, before)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward


def _run_twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
