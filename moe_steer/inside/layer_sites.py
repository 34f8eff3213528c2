"""The places inside a decoder layer at which a vector can act, found by structure."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_steer.layers import decoder_layers, text_config, unwrap

SITES = ("output", "attention", "head", "mlp")
"""Output of the layer; output of its attention module (before a norm that some families put behind it); one head of it, in the input
of the output projection; output of its MLP or mixture of experts."""
_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_NO_MLP = ("attn", "attention", "norm", "mamba", "conv", "mixer", "hc", "hyper_connection")


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
        if ("attn" in name or "attention" in name) and not set(name.split("_")) & {"norm", "hc", "hyper", "sconv"}
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
    return Place(own[0], heads)


def head_of(hidden: Tensor, heads: int, width: int, number: int) -> slice:
    """Where head ``number`` lies in the input of an output projection; ValueError where that holds other than ``heads`` heads of
    ``width``, as where ranks share them."""
    if hidden.shape[-1] != heads * width:
        raise ValueError(
            f"the output projection is given {hidden.shape[-1]} values, and {heads} heads of {width} have {heads * width}: give a vector of "
            "the heads' own width, and run the model where attention is not split over ranks (zero3, device_map, plain)"
        )
    return slice(number * width, (number + 1) * width)
