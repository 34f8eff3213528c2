"""The steering plan: what to turn up, by how much, and where. A small JSON file, checked against a model before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_steer.direction import VectorFile
from moe_steer.entries.expert_entry import EXPERT_KEYS, TOP_K_KEYS, ExpertGain, TopK
from moe_steer.entries.fitting import (
    by_content,
    check_fits_model,
    free_name,
    listed,
    read_entry,
    refuse_contradiction,
    refuse_outside,
    refuse_twice,
    refuse_unknown,
)
from moe_steer.entries.residual_entry import RESIDUAL_KEYS, UNITS, ResidualVector
from moe_steer.files import write_whole
from moe_steer.gates.conditions import When
from moe_steer.gates.probe import Probe
from moe_steer.json_files import check_types, is_number, quoted, read_json
from moe_steer.tokens import SCOPES, parse_scope

if TYPE_CHECKING:
    from torch import Tensor

    from moe_steer.entries.transform import Transform

__all__ = ["PLAN_VERSION", "SCOPES", "UNITS", "ExpertGain", "ResidualVector", "SteeringPlan", "TopK"]
PLAN_VERSION = 1
GATED_VERSION = 2
"""Of plans that say more than version 1 knows (``when``, ``do``, ``site``), so that older readers refuse them."""
MAX_DOSE = 100
_MODEL_TYPES: dict[str, Any] = {
    "model_type": str | None,
    "num_layers": int | None,
    "num_experts": int | None,
    "name": str | None,
}


@dataclass(frozen=True, kw_only=True)
class SteeringPlan:
    """Which experts get which gain or are chosen otherwise, which directions are added, at which tokens.

    ``top_k``: how many experts a token has, by layer; each entry has its own scope. What ``force``, ``logit_bias`` and ``top_k``
    mean: ``moe_steer.entries.expert_entry``.
    ``scope``: at which tokens the entries on experts act (forms: ``moe_steer.tokens.scopes``; meanings: ``moe_steer.tokens.positions``); each residual entry
    has its own.
    ``renormalize``: rescale the selected weights of a token to their former sum after the gains.
    ``model``: what the plan was made for (model_type, num_layers, num_experts, name), compared by ``check``.
    ``provenance``: free-form: who made it, from which counts, when.
    ``base_dir``: the folder that relative file names are taken from. A file is read once in the life of a plan: load the plan again
    to see a file that has changed.
    """

    experts: Sequence[ExpertGain] = ()
    residual: Sequence[ResidualVector] = ()
    top_k: Sequence[TopK] = ()
    scope: str = "all"
    renormalize: bool = False
    model: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    base_dir: str = "."
    _read: dict[str, VectorFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    """File name -> its vector, once it was needed."""
    _probes: dict[str, Probe] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        object.__setattr__(self, "residual", tuple(self.residual))
        object.__setattr__(self, "top_k", tuple(self.top_k))
        parse_scope(self.scope)
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize is {quoted(self.renormalize)}: give true or false")
        refuse_twice(self.experts, self.top_k)
        for name, value in (("model", self.model), ("provenance", self.provenance)):
            if not isinstance(value, Mapping) and not (name == "model" and value is None):
                raise ValueError(f"{name} of the plan is {quoted(value)}: give a JSON object")
        if self.model is not None:
            refuse_unknown("plan.model", self.model, set(_MODEL_TYPES))
            check_types(dict(self.model), "plan.model", _MODEL_TYPES)
        refuse_contradiction(self)

    @property
    def is_neutral(self) -> bool:
        """True when the plan changes nothing: every gain 1, every strength 0, and no say in the choice of experts."""
        return not self.active_experts and not self.active_residual and not self.top_k

    @property
    def version(self) -> int:
        """The lowest version of the format that says what the plan says."""
        old = not self.whens and all(entry.only_adds for entry in self.residual)
        return PLAN_VERSION if old else GATED_VERSION

    @property
    def whens(self) -> tuple[When, ...]:
        """The gates of all entries, each once."""
        entries: list[ExpertGain | ResidualVector] = [*self.experts, *self.residual]
        return tuple(dict.fromkeys(one.when for one in entries if one.when is not None))

    @property
    def active_experts(self) -> tuple[ExpertGain, ...]:
        """Entries that change something: a gain that is not 1, or a say in the choice."""
        return tuple(entry for entry in self.experts if not entry.is_neutral)

    @property
    def active_residual(self) -> tuple[ResidualVector, ...]:
        """Entries whose strength is not 0."""
        return tuple(entry for entry in self.residual if entry.strength != 0.0)

    def dosed(self, dose: float) -> SteeringPlan:
        """The plan with ``dose`` times what it adds to weights and logits (``ExpertGain.dosed``) and, as strength, to the residual
        stream. ValueError for a dose that is not in -MAX_DOSE..MAX_DOSE, or that an entry cannot have."""
        if not is_number(dose) or abs(dose) > MAX_DOSE:
            raise ValueError(f"dose {quoted(dose)} is out of range: give a number from -{MAX_DOSE} to {MAX_DOSE}")
        if self.top_k and dose != 1.0:
            raise ValueError("the plan sets top_k, and a number of experts has no dose: ask for the plan without one")
        residual = [dataclasses.replace(entry, strength=dose * entry.strength) for entry in self.residual]
        return dataclasses.replace(self, experts=[entry.dosed(dose) for entry in self.experts], residual=residual)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, in the order of the file format; ValueError for vectors in memory, see ``save``."""
        return {
            "version": self.version,
            "model": dict(self.model) if self.model is not None else None,
            "experts": [entry.to_dict() for entry in self.experts],
            "residual": [entry.to_dict() for entry in self.residual],
            **({"top_k": [entry.to_dict() for entry in self.top_k]} if self.top_k else {}),
            "scope": self.scope,
            "renormalize": self.renormalize,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base_dir: str | os.PathLike[str] = ".") -> SteeringPlan:
        """Read plain JSON values. Unknown keys, wrong types and other versions raise ValueError."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan is a JSON object, not {type(data).__name__}: make one with 'moe-steer plan'")
        known = {"version", "model", "experts", "residual", "top_k", "scope", "renormalize", "provenance"}
        refuse_unknown("plan", data, known)
        if data.get("version") not in (PLAN_VERSION, GATED_VERSION) or type(data["version"]) is not int:
            raise ValueError(
                f"plan version {quoted(data.get('version'))} cannot be read: this program reads versions {PLAN_VERSION} and {GATED_VERSION}, make the plan again with 'moe-steer plan'"
            )
        provenance = data.get("provenance")
        plan = cls(
            experts=[
                read_entry(ExpertGain, EXPERT_KEYS, "experts", i, item)
                for i, item in enumerate(listed(data, "experts"))
            ],
            residual=[
                read_entry(ResidualVector, RESIDUAL_KEYS, "residual", i, item)
                for i, item in enumerate(listed(data, "residual"))
            ],
            top_k=[read_entry(TopK, TOP_K_KEYS, "top_k", i, item) for i, item in enumerate(listed(data, "top_k"))],
            scope=data.get("scope", "all"),
            renormalize=data.get("renormalize", False),
            model=data.get("model"),
            provenance={} if provenance is None else provenance,
            base_dir=os.fspath(base_dir),
        )
        if plan.version > data["version"]:
            raise ValueError(
                f"an entry has 'when', 'do' or 'site' and the plan says version {PLAN_VERSION}, which has no such keys: say \"version\": {GATED_VERSION}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all. A vector in memory is written beside it, as NAME-L{layer}.safetensors with
        the plan's own NAME (a second one of a layer: NAME-L{layer}-2.safetensors), and the saved plan names that file."""
        target = Path(path)
        taken = {entry.file for entry in self.residual}
        files: dict[tuple[int, VectorFile], str] = {}
        entries: list[ResidualVector] = []
        for entry in self.residual:
            if not entry.file:
                found = self.vector(entry)
                if (entry.layer, found) not in files:
                    name = free_name(f"{target.stem}-L{entry.layer}", taken)
                    write_whole(target.with_name(name), found.content)
                    files[entry.layer, found] = name
                    taken.add(name)
                entry = dataclasses.replace(entry, file=files[entry.layer, found], vector=None)
            entries.append(entry)
        named = dataclasses.replace(self, residual=entries)
        write_whole(target, json.dumps(named.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringPlan:
        """Read a plan file; ValueError names the file and what is wrong with it."""
        name = os.fspath(path)
        data = read_json(
            path,
            "correct it there, or give a file of 'moe-steer plan'",
            missing=f"no plan file at {name!r}: make one with 'moe-steer plan'",
        )
        try:
            return cls.from_dict(data, base_dir=Path(path).parent)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def digest(self) -> str:
        """sha256 over what the plan does (not over its provenance, nor over where its vectors lie, which differs between ranks),
        for run configs and for comparing ranks. A vector in memory counts as the file that ``save`` writes for it.

        The default unit is left out, so that plans written before there were units keep their digest.
        """
        payload = dataclasses.replace(self, residual=(), provenance={}).to_dict()
        del payload["provenance"]
        payload["experts"] = [by_content(entry, self.probe) for entry in payload["experts"]]
        payload["residual"] = [by_content(one.identity(self.vector(one)), self.probe) for one in self.residual]
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def vector_path(self, entry: ResidualVector) -> Path:
        """Where a residual entry's file lies; ValueError if it is not there, and for a vector in memory."""
        if not entry.file:
            raise ValueError(f"{entry.name} is in memory and has no file: write one with SteeringPlan.save")
        path = Path(self.base_dir, entry.file)
        if not path.is_file():
            raise ValueError(
                f"the residual entry of layer {entry.layer} names {entry.file!r}, and there is no file {str(path)!r}: put it there, or name another"
            )
        return path

    def probe(self, file: str) -> Probe:
        """The probe of a gate's file; ValueError where it is none."""
        if file not in self._probes:
            self._probes[file] = Probe.load(Path(self.base_dir, file))
        return self._probes[file]

    def _probe_path(self, file: str) -> Path:
        self.probe(file)
        return Path(self.base_dir, file)

    def with_files(self, name: Callable[[Path], str], base_dir: str | os.PathLike[str]) -> SteeringPlan:
        """The plan for another folder: ``name`` says how each of its files is called from there. ValueError for a file that is not
        there."""

        def moved(entry: Any) -> Any:
            if getattr(entry, "file", ""):
                entry = dataclasses.replace(entry, file=name(self.vector_path(entry)))
            if entry.when is not None:
                entry = dataclasses.replace(entry, when=entry.when.renamed(lambda file: name(self._probe_path(file))))
            return entry

        experts, residual = list(map(moved, self.experts)), list(map(moved, self.residual))
        return dataclasses.replace(self, experts=experts, residual=residual, base_dir=os.fspath(base_dir))

    def vector(self, entry: ResidualVector) -> VectorFile:
        """The vector of a residual entry as it is in the file or in memory, with its header.

        ValueError when the file holds no finite vector [D], or one made for another layer or site.
        """
        if isinstance(entry.vector, VectorFile):
            return entry.vector
        if entry.file not in self._read:
            self._read[entry.file] = VectorFile.read(self.vector_path(entry))
        found = self._read[entry.file]
        entry.check_place(found, str(Path(self.base_dir, entry.file)))
        return found

    def load_shift(self, entry: ResidualVector) -> Tensor:
        """The tensor [D], float64, that a residual entry adds to a token: the vector times its strength in its unit.

        ValueError as for ``vector``, and when the header does not say what the unit needs.
        """
        where = str(Path(self.base_dir, entry.file)) if entry.file else entry.name
        return entry.shift_of(self.vector(entry), where)

    def load_transform(self, entry: ResidualVector) -> Transform:
        """What a residual entry that does not add does. ValueError as for ``load_shift``."""
        where = str(Path(self.base_dir, entry.file)) if entry.file else entry.name
        return entry.transform_of(self.vector(entry), where)

    def check(self, model: Any) -> None:
        """Refuse a plan that does not fit ``model`` (a transformers model or a ``ModelShape``); ValueError names the entry."""
        check_fits_model(self, model)

    def refuse_outside(self, where: str) -> None:
        """ValueError for a plan with an entry that needs this process; ``where`` it was to go: 'a baked model', 'a server'."""
        refuse_outside(self, where)
