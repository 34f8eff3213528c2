"""What a bake will do, and what no bake can do: whatever can be refused is refused before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_steer.baking.certificate import Certificate, EntryCertificate, Family
from moe_steer.baking.edits import Change, Container, Edit, NewTensor, StoredTensor
from moe_steer.baking.numbers import Rounding, is_power_of_two, nearest_power_of_two, shown
from moe_steer.plan import SteeringPlan

STEER_INSTEAD = "steer in process instead ('moe-steer generate', or steer() in Python)"


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
