"""The entries of a steering plan: a gain on an expert, a vector for the residual stream. And whether they fit a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.direction import SITE, Direction, VectorFile
from moe_steer.json_files import is_number, quoted
from moe_steer.tokens import parse_scope

if TYPE_CHECKING:
    from torch import Tensor

    from moe_steer.layers import ModelShape

UNITS = ("vector", "residual_norm")
FORCES = ("in", "out")
EXPERT_KEYS = ("layer", "expert", "gain", "force", "logit_bias")
"""What an expert's entry may hold in a plan file; of the last three at least one."""
_NO_GAIN = float("nan")


@dataclass(frozen=True, slots=True)
class ExpertGain:
    """Multiply the final gate weight of one expert, wherever the router selected it (RICE, arXiv 2505.14681, Eq. 7), and say
    whether the router selects it.

    ``layer`` is the absolute 0-based index among the decoder layers, ``expert`` the global expert id, ``gain`` a finite
    factor >= 0 (0 silences the expert's contribution; the selection itself does not change by it). ``force`` ("in" or "out")
    and ``logit_bias`` act on the choice before top-k: see ``moe_steer.choice.entries``. With one of them the gain may be left out.
    """

    layer: int
    expert: int
    gain: float = _NO_GAIN
    force: str | None = None
    logit_bias: float = 0.0

    def __post_init__(self) -> None:
        check_index("layer", self.layer, self)
        check_index("expert", self.expert, self)
        where = f"layer {self.layer} expert {self.expert}"
        if self.force is not None and (not isinstance(self.force, str) or self.force not in FORCES):
            raise ValueError(f"force of {where} is {quoted(self.force)}: give 'in' or 'out'")
        if not is_number(self.logit_bias):
            raise ValueError(f"logit_bias of {where} is {quoted(self.logit_bias)}: give a finite number")
        if self.gain is _NO_GAIN and (self.force or self.logit_bias):
            object.__setattr__(self, "gain", 1.0)
        if not is_number(self.gain) or self.gain < 0:
            raise ValueError(f"gain of {where} is {quoted(self.gain)}: give a finite number >= 0")
        if self.force == "out" and (self.gain != 1.0 or self.logit_bias):
            raise ValueError(f"{where} is forced out and has a gain or logit_bias, which would act nowhere: keep one")
        object.__setattr__(self, "gain", float(self.gain))
        object.__setattr__(self, "logit_bias", float(self.logit_bias))

    @property
    def acts_on_choice(self) -> bool:
        """Whether the entry acts before top-k."""
        return self.force is not None or self.logit_bias != 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether the entry changes nothing."""
        return self.gain == 1.0 and not self.acts_on_choice

    @property
    def action(self) -> str:
        """What is done to the expert, in short: 'x64', 'forced in x2', 'forced out', 'logit +1.5'."""
        parts = [f"forced {self.force}"] if self.force else []
        parts += [f"logit {self.logit_bias:+g}"] if self.logit_bias else []
        return " ".join([*parts, f"x{self.gain:g}"] if self.gain != 1.0 or not parts else parts)

    def dosed(self, dose: float) -> ExpertGain:
        """With ``dose`` times what the gain adds to a weight, 1 + dose * (gain - 1), and of the logit bias. ValueError for a
        gain below 0, and for an expert that is forced, which there is no half of."""
        where = f"layer {self.layer} expert {self.expert}"
        if self.force is not None and dose != 1.0:
            raise ValueError(f"{where} is forced {self.force}, and that has no dose: ask for the plan without one")
        gain = self.gain if dose == 1.0 else 1.0 + dose * (self.gain - 1.0)
        if gain < 0:
            raise ValueError(f"dose {dose:g} makes the gain {self.gain:g} of {where} {gain:g}: a gain is never below 0")
        return dataclasses.replace(self, gain=gain, logit_bias=dose * self.logit_bias)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not said is left out, so that plans of gains stay what they were."""
        values: dict[str, Any] = {"layer": self.layer, "expert": self.expert, "gain": self.gain}
        if self.force is not None:
            values["force"] = self.force
        return {**values, "logit_bias": self.logit_bias} if self.logit_bias else values

    def check(self, shape: ModelShape) -> None:
        """ValueError where the model has no such expert."""
        check_moe_layer(self.layer, f"expert {self.expert}", shape)
        if self.expert >= shape.num_experts:
            raise ValueError(
                f"expert {self.expert} at layer {self.layer} does not exist: this model has experts 0-{shape.num_experts - 1}, name one of them"
            )


@dataclass(frozen=True, slots=True)
class ResidualVector:
    """Add a multiple of a vector to the residual stream at the output of one decoder layer.

    The vector comes from ``file`` or from memory. ``file``: a safetensors file that holds one tensor ``vector`` of shape [D]; a
    relative path is taken from the folder of the plan file. ``vector``: a tensor [D] or a ``Direction``; it is copied.
    ``scope`` says at which tokens. ``unit`` says what ``strength`` counts: ``vector`` adds strength x vector as it is;
    ``residual_norm`` adds strength x residual_norm x vector / |vector|, where residual_norm is the mean norm of the residual
    stream at that layer, which the header of the file or of the ``Direction`` must hold.
    """

    layer: int
    file: str = ""
    strength: float = 1.0
    scope: str = "all"
    unit: str = "vector"
    vector: Tensor | Direction | VectorFile | None = None

    def __post_init__(self) -> None:
        check_index("layer", self.layer, self)
        if not isinstance(self.file, str) or not (self.file or self.vector is not None):
            raise ValueError(
                f"file of the residual vector at layer {self.layer} is {quoted(self.file)}: give the path of a safetensors file, or a vector"
            )
        if not is_number(self.strength):
            raise ValueError(
                f"strength of the residual vector at layer {self.layer} is {quoted(self.strength)}: give a finite number"
            )
        parse_scope(self.scope)
        if self.unit not in UNITS:
            raise ValueError(
                f"unit of the residual vector at layer {self.layer} is {quoted(self.unit)}: choose one of {', '.join(UNITS)}"
            )
        if self.vector is not None:
            if self.file:
                raise ValueError(
                    f"the residual vector at layer {self.layer} has both a vector and the file {self.file!r}: give one of them"
                )
            copy = self.vector if isinstance(self.vector, VectorFile) else VectorFile.of(self.vector)
            object.__setattr__(self, "vector", copy)
            self.check_place(copy, self.name)

    @property
    def name(self) -> str:
        """The file as the plan names it; what a vector in memory is called instead."""
        return self.file or f"the vector at layer {self.layer}"

    def audit_row(self) -> dict[str, Any]:
        """What the entry is, as an audit says it: also of a vector in memory."""
        said = {name: getattr(self, name) for name in ("strength", "unit", "scope")}
        return {"kind": "residual", "layer": self.layer, "file": self.name, **said}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ValueError for a vector in memory."""
        if not self.file:
            raise ValueError(
                f"{self.name} is in memory, and a plan in JSON names files: write both with SteeringPlan.save"
            )
        return {name: getattr(self, name) for name in RESIDUAL_KEYS}

    def check_place(self, found: VectorFile, where: str) -> None:
        """ValueError where the header of the vector, which ``where`` names, says another layer or site."""
        layer, site = found.header.get("layer"), found.header.get("site")
        if layer is not None and layer != self.layer:
            raise ValueError(
                f"{where} was made for layer {quoted(layer)} and the plan adds it at layer {self.layer}: name layer {quoted(layer)} in the plan, or make a direction for layer {self.layer}"
            )
        if site is not None and site != SITE:
            raise ValueError(
                f"{where} was made for site {quoted(site)} and a plan adds vectors at site {SITE!r} (the output of a decoder layer): make the direction again at that site"
            )

    def check(self, found: VectorFile, shape: ModelShape) -> None:
        """ValueError where the vector was made on another model, or has another width."""
        made_for = found.header.get("model")
        what = f"the vector {self.file!r}" if self.file else self.name
        for key in ("model_type", "num_layers"):
            wanted = made_for.get(key) if isinstance(made_for, dict) else None
            if wanted is not None and wanted != getattr(shape, key):
                raise ValueError(
                    f"{what} was made on a model with {key} {quoted(wanted)}, this one has {getattr(shape, key)!r}: give that model, or make a direction on this one with 'moe-steer direction'"
                )
        width = len(found.vector_D)
        if width != shape.hidden_size:
            raise ValueError(
                f"{what} has width {width}, the model's residual stream has {shape.hidden_size}: make a direction on this model with 'moe-steer direction'"
            )

    def shift_of(self, found: VectorFile, where: str) -> Tensor:
        """float64 [D]: what the entry adds to a token, its strength and unit counted in. ValueError for a vector of zeros, and
        for a header that does not say what the unit needs."""
        vector_D = found.vector_D.double()
        length = float(vector_D.norm())
        if length == 0.0:
            raise ValueError(f"{where} holds a vector of zeros, which has no direction: make the direction again")
        if self.unit == "vector":
            return vector_D * self.strength
        norm = found.header.get("residual_norm")
        if norm is None:
            raise ValueError(
                f"{where} has no residual_norm in its header, which unit 'residual_norm' needs: use unit 'vector', or make the direction with 'moe-steer direction'"
            )
        if not is_number(norm) or norm <= 0:
            raise ValueError(
                f"{where} says residual_norm is {quoted(norm)}, which is not a length: use unit 'vector', or make the direction again"
            )
        return vector_D * (self.strength * norm / length)


RESIDUAL_KEYS = ("layer", "file", "strength", "scope", "unit")
"""What an entry holds in a plan file."""


def read_vector(path: Path, entry: ResidualVector) -> VectorFile:
    """Read the vector of a plan's entry; ValueError when the file holds no finite vector, or one made for another place."""
    found = VectorFile.read(path)
    entry.check_place(found, str(path))
    return found


def check_moe_layer(layer: int, what: str, shape: ModelShape) -> None:
    """ValueError where the model has no experts at ``layer``; ``what`` the plan names there."""
    if not shape.moe_layers:
        raise ValueError(
            f"the plan names experts, but {shape.model_type} is a dense model: use residual vectors, or a mixture-of-experts model"
        )
    if layer not in shape.moe_layers:
        raise ValueError(
            f"layer {layer} ({what}) has no experts in this model: layers with experts are {_ranges(shape.moe_layers)}, name one of them"
        )


def check_index(name: str, value: object, owner: object) -> None:
    """ValueError for what is no whole number >= 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} of {type(owner).__name__} is {quoted(value)}: give a whole number >= 0")


def _ranges(numbers: Sequence[int]) -> str:
    """'1-3, 5' for (1, 2, 3, 5)."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], -1]:
        if number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = number
    return ", ".join(parts)
