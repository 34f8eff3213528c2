"""The library's code on the meta device: the bytes that exist at once, and a bound on what it does."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Unplanned(ValueError):
    """The memory of a model cannot be planned; no reason not to load it."""


class Bounded(TorchFunctionMode):
    """Stops with ``Unplanned`` after so many calls of torch: whatever a configuration says, a plan takes seconds.

    Calls and not seconds: all ranks of a run must come to the same end.
    """

    MOST = 60_000

    def __init__(self) -> None:
        super().__init__()
        self._left = self.MOST

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            raise Unplanned(
                f"a forward pass takes more than {self.MOST:,} steps: its configuration says sizes that no model has"
            )
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages.

    The layers of a model ask the same again and again, and PyTorch answers for the meta device in Python: what a call makes out
    of tensors of these shapes is remembered, where it is all new.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}
        self._total = 0
        self._made: dict[Any, Any] = {}
        """Call and shapes -> shape, strides and dtype of what it makes, in a list where that is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: list[Tensor] = []
        call = (func, *_words(args, given), *_words(kwargs.items(), given)) if makes_all_new(func) else None
        if not all(tensor.is_meta for tensor in given):
            call = None  # data may decide
        made = None if call is None else self._made.get(call)
        known = {t.untyped_storage()._cdata for t in given or tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if made is not None:
            output = [_new(*one) for one in made] if isinstance(made, list) else _new(*made)
        else:
            output = func(*args, **kwargs)
            if call is not None:
                self._made[call] = _remembered(output, known)
        for tensor in [output] if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        return output

    def add(self, number: int) -> None:
        """Bytes that stay to the end."""
        self._total += number
        self.peak = max(self.peak, self._total)

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.add(self._live[key])
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)


@functools.cache
def makes_all_new(func: Any) -> bool:
    """Whether the schema of an operation says that it writes into nothing it is given and hands back no view of it."""
    return not any(item.alias_info for item in (*func._schema.arguments, *func._schema.returns))


def _words(values: Iterable[Any], given: list[Tensor]) -> Iterator[Any]:
    """What an operation is told, to compare calls by: of tensors, which are added to ``given``, all but the data."""
    for value in values:
        if isinstance(value, Tensor):
            given.append(value)
            yield value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg()
        elif isinstance(value, (list, tuple)):
            yield tuple(_words(value, given))
        else:
            yield type(value), value  # 1, 1.0 and True are equal


def _remembered(output: Any, known: Set[int]) -> Any:
    """How to make an output again; None for one that has more, or less, than tensors of their own on the meta device. ``known``: the storages of
    what was given, which some operators hand back though their schema does not say so (``_unsafe_view``)."""
    tensors = list(output) if isinstance(output, list) else [output]
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            return None
        same = _new(tensor.shape, tensor.stride(), tensor.dtype)
        if same.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    if len(storages) < len(tensors) or storages & known:
        return None
    found = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    return found if isinstance(output, list) else found[0]


def _new(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
