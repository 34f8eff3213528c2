"""What a bake will do, what it promises about the numbers, entry by entry, and what no bake can do: whatever can be refused is refused
before a byte is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_steer.baking.edits import Change, Container, Edit, NewTensor, StoredTensor
from moe_steer.baking.numbers import Rounding, is_power_of_two, nearest_power_of_two, shown
from moe_steer.json_files import check_types, record_of
from moe_steer.plan import SteeringPlan

Verdict = Literal["exact", "rounded"]
Family = Literal["verified", "by structure", "GGUF"]

LOADERS = {
    "in-order": "reads the shards one after another in order of name, so that the last copy of a tensor stays",
    "by-index": "takes every tensor from the shard that the index names",
}
"""How engines read a folder with two tensors of one name, where they find the changed one."""
STEER_INSTEAD = "steer in process instead ('moe-steer generate', or steer() in Python)"


def check_overlay(loader: str | None) -> None:
    """ValueError for an overlay (``loader`` not None) without a word on how the engine will read it."""
    if loader is not None and loader not in LOADERS:
        known = "; ".join(f"{name}, it {what}" for name, what in LOADERS.items())
        raise ValueError(
            "an overlay leaves the old tensors in the folder under the same names, and an engine that reads shards in an order "
            "of its own (vLLM with enable_multithread_load) serves the plain model without a word: leave --overlay out, or say "
            f"with --loader how your engine reads: {known}"
        )


@dataclass(frozen=True, kw_only=True)
class EntryCertificate:
    """One entry of the plan (``expert`` None: a residual vector).

    exact: the baked model computes bit for bit what the steered model does, while nothing overflows. rounded: no stored number
    is off by more than ``bound`` (relative to what the asked gain makes of it); ``worst`` and ``rms`` are what was measured. ``applied`` is the gain that was
    baked: the asked one, or the nearest power of two. ``reversible``: the original can be computed from the baked numbers.
    ``rms`` is None for GGUF files.
    """

    layer: int
    expert: int | None
    gain: float
    applied: float
    verdict: Verdict
    bound: float
    worst: float
    rms: float | None
    format: str
    tensors: tuple[str, ...]
    reversible: bool

    @property
    def rounding(self) -> float:
        """The bound for numbers times ``applied``: what is left of it without the difference of that gain from the asked one."""
        return max(0.0, self.bound - off_by(self.gain, self.applied))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The verdict over a whole plan and checkpoint. A plan that cannot be baked has none: ``bake`` raises instead.

    ``family``: how the layout was recognised, 'verified' (the family is compared with the hooked model in the tests) or
    'by structure' (by tensor names alone); GGUF files have fixed names. ``bytes_written``: data written for ``files_written``; where the file
    system lets a copy share its source's blocks, only what differs counts (the record of a GGUF file does not keep it).
    steering.json, which holds this, comes on top.
    """

    verdict: Verdict
    bound: float
    model_type: str
    family: Family
    entries: tuple[EntryCertificate, ...]
    notes: tuple[str, ...] = ()
    loader: str | None = None
    """Of an overlay: how an engine must read the folder (LOADERS); None where every engine reads the same."""
    changed_tensors: int = 0
    changed_bytes: int = 0
    files_written: tuple[str, ...] = ()
    bytes_written: int = 0
    parts: tuple[str, ...] = ()
    """GGUF: the files of the baked model. The first is the one to load."""

    @property
    def reversible(self) -> bool:
        """Whether ``unbake`` gets the original back without the source."""
        return self.loader is not None or all(entry.reversible for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {**dataclasses.asdict(self), "reversible": self.reversible}
        return values if self.parts else {key: value for key, value in values.items() if key != "parts"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        """The inverse of ``to_dict``."""
        values = {key: value for key, value in data.items() if key != "reversible"}
        check_types(values, "certificate", {"entries": list[dict]})
        entries = tuple(record_of(EntryCertificate, entry, "entries") for entry in data["entries"])
        certificate: Certificate = record_of(cls, values, "certificate", entries=entries)
        return certificate

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.verdict_line()} ({self.model_type}, {self.family})"]
        for entry in self.entries:
            what = f"layer {entry.layer:3d} " + ("residual" if entry.expert is None else f"expert {entry.expert:3d}")
            gain = f"gain {entry.gain:g}" + (f" baked as {entry.applied:g}" if entry.applied != entry.gain else "")
            gain = "" if entry.expert is not None and entry.gain == 1 else f" {gain}"  # forced out, say: see the format
            rms = "" if entry.rms is None else f", rms {entry.rms:.1e}"
            error = "bit-exact" if entry.verdict == "exact" else f"rounded, worst {entry.worst:.1e}{rms}"
            lines.append(f"  {what}{gain}: {error}; {entry.format}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    @property
    def verdict_words(self) -> str:
        """The verdict in short."""
        return "bit-exact" if self.verdict == "exact" else "exact to rounding"

    def verdict_line(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "exact":
            return f"{self.verdict_words}: the baked model computes what the steered one does"
        return f"{self.verdict_words}: no stored number is off by more than {self.bound:.1e} of itself"


@dataclass
class Work:
    """What a bake will do: the edits of each tensor, and what the certificate says about each entry of the plan."""

    edits: dict[StoredTensor, list[tuple[Edit, Rounding]]] = field(default_factory=dict)
    entries: list[EntryCertificate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: StoredTensor, edit: Edit, lost: Rounding) -> None:
        """Take an edit in, and what its rounding loses."""
        self.edits.setdefault(tensor, []).append((edit, lost))

    def changes(self, source: Container) -> list[Change]:
        """One change a tensor, with the hash of the source's data."""
        return [
            Change(
                tensor=tensor,
                edits=tuple(edit for edit, _ in edits),
                before=source.sha256(tensor),
                lost=sum((lost for _, lost in edits), Rounding()),
            )
            for tensor, edits in self.edits.items()
        ]

    def certificate(self, model_type: str, family: Family, new: Sequence[NewTensor] = ()) -> Certificate:
        """The certificate of it; ``new`` tensors count as changed ones."""
        edited = sum(edit.end - edit.begin for edits in self.edits.values() for edit, _ in edits)
        return Certificate(
            verdict="exact" if all(entry.verdict == "exact" for entry in self.entries) else "rounded",
            bound=max((entry.bound for entry in self.entries), default=0.0),
            model_type=model_type,
            family=family,
            entries=tuple(self.entries),
            notes=tuple(self.notes),
            changed_tensors=len(self.edits) + len(new),
            changed_bytes=edited + sum(len(tensor.data) for tensor in new),
        )


def refuse_plan(plan: SteeringPlan) -> None:
    """ValueError for a plan whose effect no weights can have."""
    plan.refuse_outside("a baked model")
    if plan.active_experts and plan.renormalize:
        raise ValueError(
            f"a plan with renormalize cannot be baked: the other experts' weights change from token to token; {STEER_INSTEAD}"
        )
    if plan.top_k:
        raise ValueError(
            f"top_k of layer {plan.top_k[0].layer} cannot be baked: config.json has one number of experts a token for all layers; set it there, or {STEER_INSTEAD}"
        )
    scopes = {plan.scope} if plan.active_experts else set()
    scopes |= {entry.scope for entry in plan.active_residual}
    for scope in sorted(scopes - {"all"}):
        raise ValueError(
            f"a plan with scope {scope!r} cannot be baked: weights act at every token; use scope 'all', or {STEER_INSTEAD}"
        )


def off_by(gain: float, applied: float) -> float:
    """The relative difference of the gain that is baked from the one that was asked for."""
    return abs(applied / gain - 1) if gain else 0.0


def held_gain(gain: float, powers_only: bool, zero_too: bool, stored: str, round_gains: bool) -> float:
    """The gain that a format can hold; ValueError when that is another one and rounding was not asked for.

    ``powers_only``: the format's scales are powers of two. ``zero_too``: it can hold a gain of 0. ``stored`` names the place
    and its format: 'layer 1 expert 2 is stored as MXFP4'.
    """
    if gain == 0 and not zero_too:
        raise ValueError(f"{stored}, whose scales cannot be 0: silence it with a small gain such as {2**-20}")
    if gain == 0 or not powers_only or is_power_of_two(gain):
        return gain
    nearest = nearest_power_of_two(gain)
    if not round_gains:
        raise ValueError(
            f"{stored}, whose scales hold only powers of two, and gain {shown(gain)} is not one: take {shown(nearest)}, or let --round do so"
        )
    return nearest
