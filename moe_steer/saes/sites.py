"""Names of hook points, in TransformerLens' words and in transformers', to a decoder layer and a site."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_LAYER = re.compile(r"(?:layers|h)[._](\d+)(?:\.(.+))?$")
_SITES = {
    "hook_resid_post": "residual",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attention_out",
    "": "residual",
    "output": "residual",
    "mlp": "mlp_out",
    "mlp.output": "mlp_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn": "attention_out",
    "attn": "attention_out",
    "self_attn.output": "attention_out",
}
_HOOKS = {"residual": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}


def place_of_hook(name: str | None) -> tuple[int | None, str | None]:
    """(layer, site) of a hook point; the name itself is the site where none of ours is meant.

    The input of block N is the output of block N - 1, and is counted as that.
    """
    if not name:
        return None, None
    found = _BLOCK.search(name) or _LAYER.search(name)
    if found is None:
        return None, name
    layer, rest = int(found[1]), found[2] or ""
    if rest == "hook_resid_pre" and layer > 0:
        return layer - 1, "residual"
    return layer, _SITES.get(rest, name)


def hook_of_place(layer: int | None, site: str | None) -> str | None:
    """TransformerLens' name of a place; a site that is not one of ours is such a name already."""
    if site in _HOOKS:
        return None if layer is None else f"blocks.{layer}.{_HOOKS[site]}"
    return site
