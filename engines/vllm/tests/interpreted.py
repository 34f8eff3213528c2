"""Triton's interpreter, by which kernels run that only GPUs have otherwise: imported before Triton is, so before vLLM."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends
from triton.runtime import interpreter


def with_mask_of_bools(add: Any) -> Any:
    """The interpreter takes no other mask, and hands over one of numbers where conditions were combined."""
    return lambda operation, place, value, mask, order: add(operation, place, value, mask.astype(bool), order)


def as_backend_for_cpus() -> None:
    """Let vLLM believe that Triton runs on this machine."""
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


interpreter._interpreter.atomic_rmw = with_mask_of_bools(interpreter._interpreter.atomic_rmw)
