"""The only module that registers hooks. Every function is a context manager that leaves nothing behind, also after an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_steer.inside import uncompiled
from moe_steer.layers import MoELayer

_RECORDERS = "transformers.utils.output_capturing"
RoutingFn = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor] | None"]
"""(ids_TK int64, weights_TK) -> new weights_TK of the same dtype, or None to keep them, or (ids_TK, weights_TK) to replace both."""


class NewRouting(Protocol):
    """What a router is to return, and in it the ids. ``unused_TK``: places without a selection; None: there are none."""

    @property
    def output(self) -> tuple[Any, ...]: ...

    @property
    def ids_TK(self) -> Tensor: ...

    @property
    def unused_TK(self) -> Tensor | None: ...


ChoiceFn = Callable[[tuple[Any, ...], dict[str, Any], Any], NewRouting]
"""(arguments, keyword arguments, output) of a router -> what it is to return."""
_CHOSEN: WeakKeyDictionary[nn.Module, NewRouting | None] = WeakKeyDictionary()
"""Router under ``choice_hooks`` -> its last choice: what its output does not say (Llama-4's ids, places without a selection)."""


@contextmanager
def routing_hooks(functions: Mapping[MoELayer, RoutingFn]) -> Iterator[None]:
    """Call a function with the routing of each given layer, once per forward, and replace the weights by its result.

    The weights are final: after top-k, normalisation and scaling. Every id is the router's, so under expert parallelism
    ids >= num_experts may mean "not on this rank", or that a token has fewer experts than others of its forward. A result may
    carry a gradient, which reaches what made it. A function that replaces the ids as well must give distinct ids a token.
    """
    with uncompiled(layer.block for layer in functions), ExitStack() as stack:
        for layer, function in functions.items():
            if layer.input_scaled:
                assert layer.router is not None
                _hook(stack, layer.router.register_forward_hook, _dense_scores_hook(layer, function))
            elif layer.weights_first:
                assert layer.router is not None
                _hook(stack, layer.router.register_forward_hook, _weights_first_hook(function))
            else:
                _hook(stack, layer.experts.register_forward_pre_hook, _experts_hook(layer, function), with_kwargs=True)
        yield


@contextmanager
def choice_hooks(functions: Mapping[MoELayer, ChoiceFn]) -> Iterator[None]:
    """Let a function say what the router of each given layer returns, once per forward. It acts before every function of
    ``routing_hooks``, those that were there before included: they see the choice as it is made."""
    with uncompiled(layer.block for layer in functions), ExitStack() as stack:
        for layer, function in functions.items():
            assert layer.router is not None
            if layer.router in _CHOSEN:
                raise ValueError(f"the choice at layer {layer.index} is under another plan: put both in one plan")
            _CHOSEN[layer.router] = None
            stack.callback(_CHOSEN.pop, layer.router, None)
            # Before an engine's own hooks, which may take the router's weights away after its forward.
            _hook(stack, layer.router.register_forward_hook, _choice_hook(function), with_kwargs=True, prepend=True)
        yield


@contextmanager
def output_hooks(functions: Mapping[nn.Module, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call a function with the hidden states [B, S, D] that each given module returns; its result replaces them, and is what
    ``output_hidden_states=True`` records, also where the model was looked at before."""
    with uncompiled(functions), ExitStack() as stack:
        for module, function in functions.items():
            _hook(stack, module.register_forward_hook, _hidden_states_hook(function))
            _record_last(module)
        yield


@contextmanager
def input_hooks(functions: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Call a function with the first argument of each given module; its result replaces it."""

    def hook(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda _, args: (function(args[0]), *args[1:])

    with uncompiled(functions), ExitStack() as stack:
        for module, function in functions.items():
            _hook(stack, module.register_forward_pre_hook, hook(function))
        yield


def _hook(stack: ExitStack, register: Callable[..., Any], hook: Callable[..., Any], **how: bool) -> None:
    """Hook a module until the stack closes. A copy of the model that is made meanwhile takes the hook with it, where nobody can remove
    it: there it then does nothing."""
    open_ = [True]

    def while_open(*args: Any) -> Any:
        return hook(*args) if open_ else None

    stack.callback(open_.clear)
    stack.callback(register(while_open, **how).remove)


def _record_last(module: nn.Module) -> None:
    """Let transformers' recorders, which stay on a module from the first look on, see what all other hooks have made of the
    output. Other libraries' hooks, and the order among ours, stay as they are."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == _RECORDERS:
            module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]


@contextmanager
def call_hooks(
    module: nn.Module,
    before: Callable[[dict[str, Any]], None] | None,
    after: Callable[[dict[str, Any], Any], None],
    first: bool = False,
    turns: RLock | None = None,
) -> Iterator[None]:
    """Call ``before`` (None: nothing) with the arguments (by name) of every call of ``module``, and ``after`` with the arguments and
    the output. ``first``: before hooks that already exist, such as an engine's. ``turns``: a thread holds it until its call has ended."""
    names = list(inspect.signature(module.forward).parameters)

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(names, args, strict=False)), **kwargs}

    inside: set[int] = set()  # a thread that was interrupted is still inside; 0: the block has ended

    def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if turns is not None and get_ident() not in inside:
            while not turns.acquire(timeout=0.5):
                if 0 in inside:  # with its hooks: nobody who was in a call, or interrupted there, lets go
                    return
            inside.add(get_ident())
        if before is not None:
            before(named(args, kwargs))

    def leave(*_: Any) -> None:
        if turns is not None and get_ident() in inside:
            inside.remove(get_ident())
            turns.release()

    with uncompiled([module]), ExitStack() as stack:
        stack.callback(inside.add, 0)
        _hook(stack, module.register_forward_pre_hook, pre, with_kwargs=True, prepend=first)
        _hook(stack, module.register_forward_hook, lambda _, a, kw, out: after(named(a, kw), out), with_kwargs=True)
        if turns is not None:
            _hook(stack, module.register_forward_hook, leave, always_call=True)
        yield


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End the forward inside the with-block, and the block itself, as soon as ``module`` has returned: later layers never run.

    Enter it after the hooks that must see that module's output.
    """
    reached = _ReachedError()

    def stop(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        raise reached

    with uncompiled([module]), ExitStack() as stack:
        _hook(stack, module.register_forward_hook, stop)
        try:
            yield
        except _ReachedError as error:
            if error is not reached:
                raise


class _ReachedError(Exception):
    """Raised to leave a forward early."""


def _choice_hook(function: ChoiceFn) -> Callable[..., Any]:
    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = _CHOSEN[router] = function(args, kwargs, output)
        return new.output

    return hook


def _selected(layer: MoELayer, ids_TK: Tensor) -> Tensor:
    """The ids, with ``num_experts`` in places that hold no selection."""
    chosen = _CHOSEN.get(layer.router) if layer.router is not None else None
    if chosen is None or chosen.unused_TK is None or chosen.unused_TK.shape != ids_TK.shape:
        return ids_TK
    return ids_TK.masked_fill(chosen.unused_TK.to(ids_TK.device), layer.num_experts)


def _experts_hook(layer: MoELayer, function: RoutingFn) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Families differ in argument order and names, so the two are told apart by dtype: ids are whole numbers.
        ids_key, weights_key = _find(layer, args, kwargs)
        ids = _get(args, kwargs, ids_key)
        weights = _get(args, kwargs, weights_key)
        ids_TK = ids if ids.ndim == 2 else ids.reshape(-1, ids.shape[-1]) if ids.ndim > 1 else ids[:, None]
        result = function(_selected(layer, ids_TK.long()), _shaped(weights, ids_TK.shape))
        if result is None:
            return None
        new_ids_TK, new_TK = _both(layer, ids_TK, result)
        args, kwargs = _put(args, kwargs, weights_key, _shaped(new_TK.to(weights.dtype), weights.shape))
        if new_ids_TK is ids_TK:
            return args, kwargs
        return _put(args, kwargs, ids_key, _shaped(new_ids_TK.to(ids.dtype), ids.shape))

    return hook


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A view costs as much as a sum of a few numbers, and decoding asks for one in every layer."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _both(layer: MoELayer, ids_TK: Tensor, result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """New ids and weights; places that hold no selection keep the ids that they had."""
    if not isinstance(result, tuple):
        return ids_TK, result
    new_ids_TK, new_TK = result
    return torch.where(_selected(layer, ids_TK) != ids_TK, ids_TK, new_ids_TK), new_TK


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(key, str):
        return args, {**kwargs, key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def _find(layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, int | str]:
    tensors: list[tuple[int | str, Tensor]] = [(i, v) for i, v in enumerate(args) if isinstance(v, Tensor)]
    tensors += [(k, v) for k, v in kwargs.items() if isinstance(v, Tensor)]
    ids = [(key, value) for key, value in tensors if not value.is_floating_point() and value.dtype != torch.bool]
    if len(ids) == 1:
        weights = [key for key, value in tensors if value.is_floating_point() and value.shape == ids[0][1].shape]
        if len(weights) == 1:
            return ids[0][0], weights[0]
    raise RuntimeError(
        f"the experts of {layer.name} were not called with one id and one weight tensor: this build is unknown"
    )


def _get(args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str) -> Tensor:
    return kwargs[key] if isinstance(key, str) else args[key]


def _dense_scores_hook(layer: MoELayer, function: RoutingFn) -> Callable[..., Any]:
    """Llama-4: the router returns scores [T, E] (0 where not chosen) and logits; the scores scale the experts' inputs."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        scores_TE, logits_TE = output
        chosen = _CHOSEN.get(layer.router) if layer.router is not None else None
        ids_TK = logits_TE.topk(layer.top_k, dim=-1).indices if chosen is None else chosen.ids_TK
        result = function(_selected(layer, ids_TK), scores_TE.gather(-1, ids_TK))
        if result is None:
            return None
        new_ids_TK, new_TK = _both(layer, ids_TK, result)
        return torch.zeros_like(scores_TE).scatter(-1, new_ids_TK, new_TK.to(scores_TE.dtype)), logits_TE

    return hook


def _weights_first_hook(function: RoutingFn) -> Callable[..., Any]:
    """DeepSpeed's AutoEP: the router returns weights [T, K], ids [T, K] and tokens per expert [E]; the ids are global."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        weights_TK, ids_TK, counts_E = output
        result = function(ids_TK.long(), weights_TK)
        if result is None:
            return None
        new_ids_TK, new_TK = result if isinstance(result, tuple) else (ids_TK, result)
        if new_ids_TK is not ids_TK:
            counts_E = torch.bincount(new_ids_TK.reshape(-1), minlength=len(counts_E)).to(counts_E)
        return new_TK.to(weights_TK.dtype), new_ids_TK.to(ids_TK.dtype), counts_E

    return hook


def _hidden_states_hook(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return function(output)
        new = function(output[0])
        return None if new is None else (new, *output[1:])

    return hook
