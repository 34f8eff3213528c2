"""The decoder layers and the experts of a transformers model. The only module that knows model families.

Found by structure: a mixture-of-experts block is a module with a child ``experts`` that is called with (hidden states, expert
ids, final weights). Nearly all families of transformers 5 are built like this; the exceptions are named below.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "moe_topk",
    "num_experts_per_token",
    "top_k",
)
_ROUTER_NAMES = ("gate", "router")
_REFUSED = {
    "jetmoe": "it routes attention and MLP experts inside one fused module, where no weight can be reached",
    "switch_transformers": "it is an encoder-decoder whose router hands out masks, not ids and weights",
    "zaya": "its router marks a skipped token as expert 0 with weight 0, which cannot be told from a selection",
    "nllb-moe": "it is an encoder-decoder whose router hands out masks, not ids and weights",
}
_CHOICE_OUT_OF_REACH = {
    "dbrx": "its router returns logits, and the block takes the best of them after it",
    "phimoe": "its router picks one expert after the other, each with a weight of its own (SparseMixer)",
}


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model, with which plans and counts must agree. ``num_experts`` is 0 and ``moe_layers`` empty for a
    dense model."""

    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "moe_layers": list(self.moe_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelShape:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "moe_layers": tuple(data["moe_layers"])})


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One mixture-of-experts block. ``index`` counts all decoder layers from 0, dense ones included.

    ``input_scaled``: the weight multiplies the expert's input, as in Llama-4 (out = f(weight * x)), and is reached at the
    router's output; elsewhere it multiplies the expert's output and is reached at the input of ``experts``.
    ``weights_first``: DeepSpeed's AutoEP has put its own block in place; its router returns (weights, ids, tokens per expert),
    and there the weight is reached.
    """

    index: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module | None
    num_experts: int
    top_k: int
    input_scaled: bool = False
    weights_first: bool = False


def unwrap(model: Any) -> Any:
    """The transformers model inside an inference engine or a data-parallel wrapper."""
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not hasattr(model, "config"):
        raise TypeError(
            f"a {type(model).__name__} is no model: give one that load_model or transformers has loaded (of a pipeline, its .model)"
        )
    return getattr(model, "module", model) if type(model).__name__.endswith("Engine") else model


def text_config(model: Any) -> Any:
    """The configuration of the text part."""
    config = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def token_limits(model: Any) -> tuple[int, int | None]:
    """How many token ids a model has, and how many tokens its context; None where its configuration does not say."""
    inner, config = unwrap(model), text_config(model)
    vocabulary = getattr(inner.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
    return vocabulary, getattr(config, "max_position_embeddings", None)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers; ValueError when no list or several lists qualify."""
    inner = unwrap(model)
    config = text_config(inner)
    # LongCat counts two attentions a layer in num_hidden_layers; its num_layers is the length of the list.
    num_layers = getattr(config, "num_layers", None) or getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not any(part in name for part in ("vision", "visual", "audio", "encoder"))
    ]
    outermost = [item for item in found if not any(item[0].startswith(other[0] + ".") for other in found)]
    model_type = getattr(inner.config, "model_type", type(inner).__name__)
    if not outermost:
        raise ValueError(
            f"no list of {num_layers} decoder layers was found in {model_type}: pass a transformers decoder model"
        )
    if len(outermost) > 1:
        names = ", ".join(name for name, _ in outermost)
        raise ValueError(
            f"{model_type} has several stacks of decoder layers ({names}): pass the one to work on, as in model.thinker"
        )
    return outermost[0]


def decoder(model: Any) -> nn.Module:
    """The module that owns the decoder layers and is called with input_ids, attention_mask and past_key_values."""
    name, _ = decoder_layers(model)
    return unwrap(model).get_submodule(name.rpartition(".")[0])


def moe_layers(model: Any) -> list[MoELayer]:
    """All mixture-of-experts layers in order; ValueError for dense models and for families whose experts cannot be hooked."""
    inner = unwrap(model)
    model_type = getattr(inner.config, "model_type", type(inner).__name__)
    if model_type in _REFUSED:
        raise ValueError(f"{model_type} cannot be observed or steered: {_REFUSED[model_type]}")
    prefix, _ = decoder_layers(inner)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)(?:\.|$)")
    found: list[MoELayer] = []
    for name, block in inner.named_modules():
        experts = getattr(block, "experts", None)
        match = pattern.match(name)
        if match is None or not isinstance(experts, nn.Module):
            continue
        layer = _layer(int(match[1]), name, block, experts, inner)
        if layer is not None:
            found.append(layer)
    indices = [layer.index for layer in found]
    if len(set(indices)) != len(indices):
        raise ValueError(
            f"{model_type} has several expert blocks in one decoder layer: a layer index would not name one of them"
        )
    if not found:
        raise ValueError(
            f"{model_type} has no routed experts that can be reached: it is a dense model, or of an unknown build"
        )
    return sorted(found, key=lambda layer: layer.index)


def refuse_loops(model: Any, layers: Iterable[int]) -> None:
    """ValueError for layers that a model runs several times in every forward (Inkling-2's loop, Dory's recurrent section): a token
    has several choices and states there, of which none is the layer's. They can be steered, each time that they run."""
    config = text_config(model)
    times = getattr(config, "loop_num_passes", 0) or getattr(config, "n_recurrent_loops", 0)
    start = getattr(config, "loop_layer_index_start", 0) or getattr(config, "n_input_layers", 0)
    stop = getattr(config, "loop_layer_index_end", 0) or start + (getattr(config, "n_recurrent_layers", 0) or 0)
    if times > 1 and (found := sorted(set(layers) & set(range(start, stop)))):
        raise ValueError(
            f"layer {found[0]} of {config.model_type} runs {times} times in every forward, as layers {start}-{stop - 1} do, so what it does "
            "there to a token is not one thing to observe: name layers outside of these; a plan made elsewhere steers all of them"
        )


def choice_by_type(model_type: str) -> str:
    """Why the choice of a whole family cannot be changed before top-k; empty for all others."""
    return _CHOICE_OUT_OF_REACH.get(model_type, "")


def choice_refusal(layer: MoELayer, wants_k: bool) -> str:
    """Why the choice of one layer cannot be changed before top-k, or (``wants_k``) cannot be of another number of experts."""
    methods = [vars(kind) for kind in type(layer.router).__mro__ if kind not in nn.Module.__mro__]
    names = {name for values in methods for value in values.values() for name in _names_in(value)}
    if layer.router is None or "topk" not in names:
        return f"its {type(layer.router).__name__} takes no top-k over scores (layers may look their experts up by token); use gains alone"
    if wants_k and layer.weights_first:
        return "DeepSpeed's AutoEP sends every token to the model's own number of experts; use tp_ep or zero3 for top_k"
    return ""


def _names_in(value: Any) -> tuple[str, ...]:
    return getattr(getattr(inspect.unwrap(value), "__code__", None), "co_names", ()) if callable(value) else ()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode during the block: a router may add noise in training mode."""
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    try:
        yield
    finally:
        inner.train(was_training)


@contextmanager
def weights_in_memory(module: nn.Module) -> Iterator[None]:
    """Inside the block the weights of a module can be read, also where accelerate keeps them elsewhere between calls."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def model_shape(model: Any) -> ModelShape:
    """The shape of a dense or mixture-of-experts model."""
    inner = unwrap(model)
    config = text_config(inner)
    # The configuration cannot decide this: a dense model of a family with experts keeps the default number of experts.
    has_experts = any(isinstance(getattr(module, "experts", None), nn.Module) for module in decoder(inner).modules())
    layers = moe_layers(inner) if has_experts or inner.config.model_type in _REFUSED else []
    return ModelShape(
        model_type=inner.config.model_type,
        num_layers=len(decoder_layers(inner)[1]),
        num_experts=layers[0].num_experts if layers else 0,
        top_k=layers[0].top_k if layers else 0,
        moe_layers=tuple(layer.index for layer in layers),
        hidden_size=config.hidden_size,
        name=str(getattr(inner.config, "_name_or_path", "") or ""),
    )


def _layer(index: int, name: str, block: nn.Module, experts: nn.Module, model: nn.Module) -> MoELayer | None:
    if getattr(block, "_is_autoep_layer", False):
        own: Any = block.router
        return MoELayer(index, name, block, experts, own, own.num_experts, own.top_k, weights_first=True)
    parameters = list(inspect.signature(experts.forward).parameters)
    router = next(
        (getattr(block, key) for key in _ROUTER_NAMES if isinstance(getattr(block, key, None), nn.Module)), None
    )
    # Since transformers 5.23 they take ids and weights, and the block calls another function of theirs, past every hook.
    if "routing_data" in parameters or hasattr(experts, "forward_routed"):
        raise ValueError(
            f"the experts of {text_config(model).model_type} are held in MXFP4 by a kernel that takes no ids and weights, so they "
            "cannot be observed or steered: load them expanded, with dtype bfloat16"
        )
    input_scaled = len(parameters) == 1 and router is not None and type(router).__name__ == "Llama4Router"
    if len(parameters) < 3 and not input_scaled:
        return None
    config = text_config(model)
    num_experts = _first(config, _NUM_EXPERTS_KEYS, 0) or _first(
        getattr(config, "ffn_config", None), _NUM_EXPERTS_KEYS, 0
    )
    num_experts = num_experts or _first(experts, ("num_experts",), 0)
    num_experts += getattr(config, "zero_expert_num", None) or 0  # LongCat's identity experts have their own ids
    top_k = _first(router, ("top_k",), 0) or _first(block, ("top_k",), 0) or _first(config, _TOP_K_KEYS, 0)
    if not num_experts or not top_k:
        raise ValueError(
            f"the number of experts or the top-k of {config.model_type} cannot be read from its configuration"
        )
    if not 0 < top_k <= num_experts:
        raise ValueError(
            f"{top_k} of {num_experts} experts a token is what its configuration says: 1 to all can be chosen"
        )
    return MoELayer(index, name, block, experts, router, num_experts, top_k, input_scaled)


def _first(owner: Any, names: tuple[str, ...], default: int) -> int:
    """The first attribute that is a whole number; lists (one number per layer) are skipped."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default
