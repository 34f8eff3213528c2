"""``Probe``: a linear reading of the residual stream with its history, as one safetensors file that a plan's gate, or an arm that
ends thoughts, can name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_steer.direction import SITE
from moe_steer.files import HeadedKind, load_headed, write_whole
from moe_steer.json_files import is_number, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from moe_steer.layers import ModelShape

VERSION = 1
_KIND = HeadedKind(
    key="probe",
    version=VERSION,
    noun="probe",
    content="probe",
    command="moe-steer probe",
    again="make the probe again",
)
_PLACE = ("version", "layer", "site", "bias", "threshold")


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """The probability that something holds at a token: sigmoid(weight_D . h_D + bias), h_D being the output of decoder layer
    ``layer`` (absolute, 0-based) at that token, in its own units.

    ``weight_D``: float32. ``threshold``: the probability from which on the thing is said to hold. ``header``: JSON values; those of
    ``moe-steer probe`` are described in ``moe_steer.gates.probe_fit``. ValueError in one line for numbers that are not finite, and for a
    threshold outside 0..1.
    """

    weight_D: Tensor
    bias: float
    layer: int
    threshold: float = 0.5
    site: str = SITE
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_D", self.weight_D.detach().cpu().float().contiguous())
        if self.weight_D.ndim != 1 or not bool(self.weight_D.isfinite().all()):
            raise ValueError(
                f"a probe of shape {tuple(self.weight_D.shape)} for layer {self.layer}: give one finite weight [D]"
            )
        if type(self.layer) is not int or self.layer < 0:
            raise ValueError(f"layer of a probe is {quoted(self.layer)}: give a whole number >= 0")
        if self.site != SITE:
            raise ValueError(
                f"site of a probe is {quoted(self.site)}: probes read {SITE!r}, the output of a decoder layer"
            )
        if not is_number(self.bias):
            raise ValueError(f"bias of a probe is {quoted(self.bias)}: give a finite number")
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold of a probe is {quoted(self.threshold)}: give a probability from 0 to 1")
        taken = sorted(set(self.header) & set(_PLACE))
        if taken:
            raise ValueError(f"the header of a probe may not hold {taken[0]!r}: that is a field of its own")

    def log_odds(self, hidden_TD: Tensor) -> Tensor:
        """float32 [...] for hidden states [..., D] of any dtype and device. ValueError for another width."""
        if hidden_TD.shape[-1] != len(self.weight_D):
            raise ValueError(
                f"the probe of layer {self.layer} has width {len(self.weight_D)}, these hidden states {hidden_TD.shape[-1]}: "
                "make a probe on this model"
            )
        return hidden_TD.float() @ self.weight_D.to(hidden_TD.device) + self.bias

    def probability(self, hidden_TD: Tensor) -> Tensor:
        """float32 [...], from 0 to 1: the sigmoid of ``log_odds``."""
        return self.log_odds(hidden_TD).sigmoid()

    def check(self, shape: ModelShape) -> None:
        """ValueError where the probe was made on another model, or has another width."""
        made_on = self.header.get("model")
        for key in ("model_type", "num_layers"):
            wanted = made_on.get(key) if isinstance(made_on, dict) else None
            if wanted is not None and wanted != getattr(shape, key):
                raise ValueError(
                    f"the probe was made on a model with {key} {quoted(wanted)}, this one has {getattr(shape, key)!r}: make one on "
                    "this model with 'moe-steer probe'"
                )
        if self.layer >= shape.num_layers:
            raise ValueError(f"the probe reads layer {self.layer}: this model has layers 0-{shape.num_layers - 1}")
        if len(self.weight_D) != shape.hidden_size:
            raise ValueError(
                f"the probe has width {len(self.weight_D)}, the model's residual stream has {shape.hidden_size}: make one on this "
                "model with 'moe-steer probe'"
            )

    @property
    def trained_on(self) -> frozenset[str] | None:
        """Digests of the prompts that it was fitted on; None where its file does not say."""
        trained = self.header.get("trained")
        prompts = trained.get("prompts") if isinstance(trained, dict) else None
        return frozenset(map(str, prompts)) if isinstance(prompts, list) else None

    @property
    def head(self) -> dict[str, Any]:
        """The header as its file holds it."""
        place = {"version": VERSION, "layer": self.layer, "site": self.site}
        return {**place, "bias": float(self.bias), "threshold": float(self.threshold), **self.header}

    def to_bytes(self) -> bytes:
        """The content of its file: one tensor ``weight`` [D] float32, and the header under the metadata key ``probe``."""
        from safetensors.torch import save

        return save({"weight": self.weight_D}, {_KIND.key: json.dumps(self.head, sort_keys=True, allow_nan=False)})

    def digest(self) -> str:
        """sha256 over what the probe computes: weight, bias and layer."""
        said = json.dumps([self.layer, self.site, float(self.bias)]).encode()
        return hashlib.sha256(said + self.weight_D.numpy().tobytes()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a file of ``save``; ValueError in one line says what is wrong with it."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
            rest = {key: value for key, value in header.items() if key not in _PLACE}
            place = {key: header[key] for key in _PLACE if key != "version"}
            return cls(weight_D=tensors["weight"], header=rest, **place)

        return load_headed(path, _KIND, {"weight"}, build)
