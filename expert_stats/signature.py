"""What routing counts are of: everything that must be equal for two counts to be added."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CountsSignature:
    """Everything that must be equal for two counts to be added."""

    model: Mapping[str, Any]
    """The model's shape (``ModelShape.to_dict``): model_type, num_layers, num_experts, top_k, moe_layers, hidden_size, name."""
    markers: Mapping[str, Any]
    """The markers (``MarkerSet.to_dict``): names, forms, coefficients, where they are read, tokenizer."""
    base: str = "generated"
    """Which tokens are the base rate: "generated" or "all"."""
    prompt_tail: int = 4
    """Number of last prompt tokens in which a marker counts for the response."""
    routers: str = ""
    """Fingerprint of the router weights; distinguishes two checkpoints of the same shape."""
    counted: str = "selections"
    """An expert counts as active at a token when it is among the top-k, regardless of its weight (RICE)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def difference(self, other: CountsSignature) -> str | None:
        """The first field that differs, with both values; None when counts may be added.

        Model names (folders or hub ids) may differ if the fingerprints of the routers are equal. A missing fingerprint ("":
        the routers were sharded) matches every other.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        if not (self.routers and other.routers):
            mine["routers"] = theirs["routers"] = None
        if self.routers and self.routers == other.routers:
            mine["model.name"] = theirs["model.name"] = None
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"{key} is {_short(mine.get(key))} here and {_short(theirs.get(key))} there"
        return None

    def merged(self, other: CountsSignature) -> CountsSignature:
        """The signature of a sum; the name that sorts first, so that the order of addition does not matter."""
        name = min(str(self.model.get("name", "")), str(other.model.get("name", "")))
        routers = self.routers or other.routers
        return dataclasses.replace(self, model={**self.model, "name": name}, routers=routers)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; sequences as JSON text, so that tuples and lists compare as equal."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"
