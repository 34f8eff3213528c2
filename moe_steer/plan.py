"""The steering plan: what to turn up, by how much, and where. A small JSON file, checked against a model before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.files import write_text
from moe_steer.plan_check import check_plan
from moe_steer.plan_entries import UNITS, ExpertGain, ResidualVector
from moe_steer.residual_files import read_vector, shift_of
from moe_steer.tokens import SCOPES, parse_scope

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLAN_VERSION", "SCOPES", "UNITS", "ExpertGain", "ResidualVector", "SteeringPlan"]
PLAN_VERSION = 1
_MODEL_KEYS = {"model_type", "num_layers", "num_experts", "name"}


@dataclass(frozen=True, kw_only=True)
class SteeringPlan:
    """Which experts get which gain, which directions are added, at which tokens.

    ``scope``: at which tokens the gains act (forms: ``moe_steer.tokens.scopes``; meanings: ``moe_steer.tokens.positions``); each residual entry
    has its own.
    ``renormalize``: rescale the selected weights of a token to their former sum after the gains.
    ``model``: what the plan was made for (model_type, num_layers, num_experts, name), compared by ``check``.
    ``provenance``: free-form: who made it, from which counts, when.
    """

    experts: Sequence[ExpertGain] = ()
    residual: Sequence[ResidualVector] = ()
    scope: str = "all"
    renormalize: bool = False
    model: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    base_dir: str = "."

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        object.__setattr__(self, "residual", tuple(self.residual))
        parse_scope(self.scope)
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize is {self.renormalize!r}: give true or false")
        seen: set[tuple[int, int]] = set()
        for entry in self.experts:
            key = (entry.layer, entry.expert)
            if key in seen:
                raise ValueError(f"layer {entry.layer} expert {entry.expert} stands twice in the plan: keep one gain")
            seen.add(key)
        if self.model is not None:
            _refuse_unknown("plan.model", self.model, _MODEL_KEYS)

    @property
    def is_neutral(self) -> bool:
        """True when the plan changes nothing: every gain 1 and every strength 0."""
        return not self.active_experts and not self.active_residual

    @property
    def active_experts(self) -> tuple[ExpertGain, ...]:
        """Entries whose gain is not 1."""
        return tuple(entry for entry in self.experts if entry.gain != 1.0)

    @property
    def active_residual(self) -> tuple[ResidualVector, ...]:
        """Entries whose strength is not 0."""
        return tuple(entry for entry in self.residual if entry.strength != 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, in the order of the file format."""
        return {
            "version": PLAN_VERSION,
            "model": dict(self.model) if self.model is not None else None,
            "experts": [dataclasses.asdict(entry) for entry in self.experts],
            "residual": [dataclasses.asdict(entry) for entry in self.residual],
            "scope": self.scope,
            "renormalize": self.renormalize,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base_dir: str | os.PathLike[str] = ".") -> SteeringPlan:
        """Read plain JSON values. Unknown keys, wrong types and other versions raise ValueError."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan is a JSON object, not {type(data).__name__}: make one with 'moe-steer plan'")
        _refuse_unknown("plan", data, {"version", "model", "experts", "residual", "scope", "renormalize", "provenance"})
        if data.get("version") != PLAN_VERSION:
            raise ValueError(
                f"plan version {data.get('version')!r} cannot be read: this program reads version {PLAN_VERSION}, make the plan again with 'moe-steer plan'"
            )
        return cls(
            experts=[_entry(ExpertGain, "experts", i, item) for i, item in enumerate(_list(data, "experts"))],
            residual=[_entry(ResidualVector, "residual", i, item) for i, item in enumerate(_list(data, "residual"))],
            scope=data.get("scope", "all"),
            renormalize=data.get("renormalize", False),
            model=data.get("model"),
            provenance=data.get("provenance") or {},
            base_dir=os.fspath(base_dir),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: aside first, then renamed, so that no reader sees half a file."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringPlan:
        """Read a plan file; ValueError names the file and what is wrong with it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"no plan file at {os.fspath(path)!r}: make one with 'moe-steer plan'") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the plan file {os.fspath(path)!r} cannot be read ({error}): give a file of 'moe-steer plan'"
            ) from error
        try:
            return cls.from_dict(json.loads(text), base_dir=Path(path).parent)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{os.fspath(path)} is not JSON ({error}): mend it there, or make a plan with 'moe-steer plan'"
            ) from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def digest(self) -> str:
        """sha256 over what the plan does (not over its provenance, nor over where its vectors lie, which differs between ranks),
        for run configs and for comparing ranks.

        The default unit is left out, so that plans written before there were units keep their digest.
        """
        payload = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        for entry, item in zip(payload["residual"], self.residual, strict=True):
            if item.unit == UNITS[0]:
                del entry["unit"]
            del entry["file"]
            entry["sha256"] = hashlib.sha256(self.vector_path(item).read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def vector_path(self, entry: ResidualVector) -> Path:
        """Where a residual entry's file lies; ValueError if it is not there."""
        path = Path(self.base_dir, entry.file)
        if not path.is_file():
            raise ValueError(
                f"the residual entry of layer {entry.layer} names {entry.file!r}, and there is no file {str(path)!r}: put it there, or name another"
            )
        return path

    def check(self, model: Any) -> None:
        """Refuse a plan that does not fit ``model`` (a transformers model or a ``ModelShape``); ValueError names the entry."""
        check_plan(self, model)

    def load_vector(self, entry: ResidualVector) -> Tensor:
        """The tensor [D], float32, of a residual entry as it stands in the file.

        ValueError when the file holds no such finite vector, or was made for another layer or site.
        """
        return read_vector(self.vector_path(entry), entry).vector_D

    def load_shift(self, entry: ResidualVector) -> Tensor:
        """The tensor [D], float64, that a residual entry adds to a token: the vector times its strength in its unit.

        ValueError as for ``load_vector``, and when the file does not say what the unit needs.
        """
        return shift_of(self.vector_path(entry), entry)


def _refuse_unknown(where: str, data: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in {where}: it may hold {', '.join(sorted(allowed))}")


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is {type(value).__name__}: give a JSON list")
    return value


def _entry(kind: Any, where: str, position: int, item: Any) -> Any:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}[{position}] is {item!r}: give a JSON object")
    _refuse_unknown(f"{where}[{position}]", item, {f.name for f in dataclasses.fields(kind)})
    try:
        return kind(**item)
    except TypeError as error:
        needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
        raise ValueError(f"{where}[{position}] is not complete: give {', '.join(needed)}") from error
