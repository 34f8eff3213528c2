"""Inside a decoder layer: the places at which a vector can act, found by structure, modules whose forward is replaced for a while,
and what a call holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import update_wrapper, wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_steer.layers import decoder_layers, text_config, unwrap

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_NO_MLP = ("attn", "attention", "norm", "mamba", "conv", "mixer", "hc", "hyper_connection", "input")


class Place(NamedTuple):
    """Where a site is: what ``module`` returns, or (``heads`` > 0) what it is given, ``heads`` parts side by side."""

    module: nn.Module
    heads: int = 0


def place_of(model: Any, layer: int, site: str) -> Place:
    """The place of a site; ValueError, in one line, for a family whose layer has no such place."""
    module = decoder_layers(model)[1][layer]
    if site == "output":
        return Place(module)
    parts = {name: part for name, part in module.named_children() if any(True for _ in part.children())}
    model_type = getattr(unwrap(model).config, "model_type", type(model).__name__)
    here = f"layer {layer} of {model_type}"
    if site == "mlp":
        found = [name for name in parts if not any(word in name for word in _NO_MLP)]
        if len(found) != 1 or isinstance(parts[found[0]], nn.ModuleList):
            raise ValueError(
                f"{here} has no one module as its MLP (it holds {', '.join(parts)}): use the site 'output'"
            )
        return Place(parts[found[0]])
    found = [
        name
        for name in parts
        if ("attn" in name or "attention" in name)
        and not set(name.split("_")) & {"norm", "hc", "hyper", "sconv", "convolution", "input"}
    ]
    if len(found) != 1 or isinstance(parts[found[0]], nn.ModuleList):
        raise ValueError(f"{here} has no one attention module (it holds {', '.join(parts)}): use the site 'output'")
    attention = parts[found[0]]
    if site == "attention":
        return Place(attention)
    own = [part for name, part in attention.named_children() if name in _PROJECTIONS]
    heads = getattr(text_config(model), "num_attention_heads", 0)
    if len(own) != 1 or "linear" in found[0] or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"{here} has no output projection that takes its heads side by side: use the site 'attention'")
    return Place(getattr(own[0], "linear", own[0]), heads)  # behind the gate that Inkling-2's projection holds


def head_of(hidden: Tensor, heads: int, width: int, number: int) -> slice:
    """Where head ``number`` lies in the input of an output projection; ValueError where that holds other than ``heads`` heads of
    ``width``, as where ranks share them."""
    if hidden.shape[-1] != heads * width:
        raise ValueError(
            f"the output projection is given {hidden.shape[-1]} values, and {heads} heads of {width} have {heads * width}: give a vector of "
            "the heads' own width, and run the model where attention is not split over ranks (zero3, device_map, plain)"
        )
    return slice(number * width, (number + 1) * width)


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block each given module keeps only its input for the backward pass and runs once more there (checkpointing;
    Chen et al., arXiv 1604.06174). In evaluation mode too, where the library's own switch does nothing.

    The backward pass must be inside the block, and inside that of every hook: what the modules call is called again.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(
                _replaced(module, "forward", update_wrapper(_run_twice(module.forward), module.forward))
            )
        yield


def not_again(function: Callable[..., None]) -> Callable[..., None]:
    """The function without the calls in a backward pass: what a module computes there, it has computed before (checkpointing)."""

    @wraps(function)
    def first(*args: Any, **kwargs: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            function(*args, **kwargs)

    return first


@contextmanager
def replaced_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block ``module`` returns ``output`` without running."""
    with _replaced(module, "forward", update_wrapper(lambda *_, **__: output, module.forward)):
        yield


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What an argument that holds a cache is called: before transformers 5.24, and in code that comes with checkpoints, not the first."""


def cache_of(call: Mapping[str, Any], output: Any = None) -> Any:
    """The cache of a call, or the one that its output hands back."""
    given = next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)
    own = "cache" if hasattr(output, "cache") else "past_key_values"
    return getattr(output, own, None) if given is None else given


def columns_of(call: Mapping[str, Any]) -> int:
    """Of the cache that a call is given."""
    cache = cache_of(call)
    return 0 if cache is None else int(cache.get_seq_length())


def _in_parts(ids_BS: Tensor, config: Any, options: Mapping[str, Any], *_: Any, **__: Any) -> str:
    """What of a call of ``_prefill`` reads a prompt in parts; empty where nothing does."""
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    mask, past = options.get("attention_mask"), columns_of(options)
    length = (ids_BS if mask is None else mask).shape[1]
    # One token more than the cache holds is the newest of a text that goes on.
    return "a cache that holds the beginning of the prompt (past_key_values)" if past and length > past + 1 else ""


_HIDES_THE_PROMPT: Mapping[str, Callable[..., str]] = {
    "_prefill": _in_parts,
    # The first draft is read together with the prompt.
    "_get_candidate_generator": lambda *_, **__: "assisted decoding (an assistant, prompt lookup)",
}
"""Method of ``generate`` -> what in a call of it hides the end of the prompt, in words; empty where nothing does."""


@contextmanager
def prompts_in_one_part(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model.generate`` refuses to read a prompt in parts, or drafts with it: nothing in such a forward tells the prompt from
    what is generated. A copy of the model that is made inside runs itself, and after the block refuses nothing."""
    open_ = [True]

    def guarded(method: Callable[..., Any], hiding: Callable[..., str]) -> Callable[..., Any]:
        def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
            if open_ and (found := hiding(*args, **kwargs)):
                raise ValueError(
                    f"{found} hides where the prompt ends from a plan with a scope: leave it out, pass prompt_lengths to steer, or "
                    "use scope all"
                )
            return method(self, *args, **kwargs)

        return update_wrapper(whole, method)

    with ExitStack() as stack:
        for name, hiding in _HIDES_THE_PROMPT.items():
            method = getattr(type(model), name, None)
            if method is not None:  # a model of the library, and not its decoder alone
                stack.enter_context(_replaced(model, name, MethodType(guarded(method, hiding), model)))
        try:
            yield
        finally:
            open_.clear()


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The signature is read by callers (the library filters arguments by it): ``update_wrapper`` keeps it."""
    own = name in vars(module)  # accelerate has put a forward there
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own:
            setattr(module, name, before)
        else:
            delattr(module, name)


def _run_twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _Uncompiled:
    """Inside, compiled modules run as they are written: what was compiled before keeps the hooks of its time and sees no others.
    One for all hooks, since the setting is the process's."""

    lock, users, stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stack.close()


_UNCOMPILED = _Uncompiled()


def uncompiled(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """A block in which compiled code runs as it is written. Not where the modules' model attends by flex attention, which is made to be
    compiled (as written it holds every score at once): there, steer first and compile afterwards."""
    hooked = list(modules)
    configs = (getattr(part, "config", None) for module in hooked for part in module.modules())
    # The first that says it: the modules of a model share their configuration, and its experts may be thousands.
    attention = next((name for config in configs if (name := getattr(config, "_attn_implementation", None))), None)
    return _UNCOMPILED if hooked and attention != "flex_attention" else nullcontext()
