"""What a plan actually changed: counted on the device while it ran, read once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.plan_entries import ExpertGain, ResidualVector

_ADD_UP_AT = 8192  # selections that are kept on the device before they are summed


class Fired(NamedTuple):
    """``tokens`` in scope that selected the expert; ``weight_added``: sum over them of new minus old gate weight."""

    tokens: int
    weight_added: float


@dataclass
class _Waiting:
    """Forwards of one layer that are not added up yet: ids, mask and weight added, [T, K] each."""

    num_experts: int
    notes: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    size: int = 0


class SteeringWarning(UserWarning):
    """A plan changed nothing, or a layer that it names never ran."""


class NothingFired(RuntimeError):
    """Raised instead of the warning when steering is strict."""


class Audit:
    """Counts of one ``steer`` block. Entries with gain 1 or strength 0 have no hook and are not counted."""

    def __init__(self, experts: Iterable[ExpertGain], residual: Iterable[ResidualVector]) -> None:
        self._entries = {(entry.layer, entry.expert): entry for entry in experts}
        self._residual = dict(enumerate(residual))
        self._waiting: dict[int, _Waiting] = {}
        self._tokens: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {layer: 0 for layer, _ in self._entries}
        self._touched: dict[int, Tensor | int] = dict.fromkeys(self._residual, 0)
        self._residual_runs: dict[int, int] = dict.fromkeys(self._residual, 0)

    def count_experts(
        self, layer: int, num_experts: int, ids_TK: Tensor, in_scope_TK: Tensor | None, added_TK: Tensor
    ) -> None:
        """Record one forward of one layer: ids in 0..num_experts (the last means "not on this rank"); no mask means every token.

        The caller must not change the tensors later: they are summed many forwards at a time, because a sum after every
        decode step would cost too much.
        """
        self._seen[layer] += 1
        waiting = self._waiting.setdefault(layer, _Waiting(num_experts))
        waiting.notes.append((ids_TK, in_scope_TK, added_TK))
        waiting.size += ids_TK.numel()
        if waiting.size >= _ADD_UP_AT:
            self._add_up(layer)

    def _add_up(self, layer: int) -> None:
        waiting = self._waiting[layer]
        if not waiting.notes:
            return
        notes, waiting.notes, waiting.size = waiting.notes, [], 0
        device = notes[0][0].device
        if layer not in self._tokens:
            with torch.inference_mode(False):  # a tensor that may also be changed outside of inference mode
                self._tokens[layer] = torch.zeros(waiting.num_experts + 1, dtype=torch.long, device=device)
                self._added[layer] = torch.zeros(waiting.num_experts + 1, dtype=torch.float64, device=device)
        with torch.no_grad():
            ids = torch.cat([ids_TK.reshape(-1) for ids_TK, _, _ in notes])
            counted = [torch.ones_like(ids_TK) if mask is None else mask.long() for ids_TK, mask, _ in notes]
            self._tokens[layer].scatter_add_(0, ids, torch.cat([one.reshape(-1) for one in counted]))
            added = torch.cat([added_TK.detach().reshape(-1).double() for _, _, added_TK in notes])
            self._added[layer].scatter_add_(0, ids, added)

    def count_residual(self, index: int, tokens: Tensor | int) -> None:
        """Add one forward of the residual entry number ``index``."""
        self._touched[index] = self._touched[index] + tokens
        self._residual_runs[index] += 1

    @property
    def fired(self) -> Mapping[tuple[int, int], Fired]:
        """(layer, expert) -> tokens and weight added, for every entry with a gain other than 1."""
        result = {}
        for layer in self._waiting:
            self._add_up(layer)
        for layer, expert in self._entries:
            if layer in self._tokens:
                result[layer, expert] = Fired(int(self._tokens[layer][expert]), float(self._added[layer][expert]))
            else:
                result[layer, expert] = Fired(0, 0.0)
        return result

    @property
    def residual(self) -> Mapping[int, int]:
        """Index of the residual entry (among those with a strength) -> number of tokens it was added to."""
        return {index: int(touched) for index, touched in self._touched.items()}

    def problems(self) -> list[str]:
        """Reasons why the plan had no effect (nothing fired, or a named layer never ran); empty if it had."""
        found = [
            f"layer {layer} is named in the plan and never ran"
            for layer, runs in sorted(self._seen.items())
            if not runs
        ]
        found += [
            f"the residual vector at layer {self._residual[index].layer} is in the plan and never ran"
            for index, runs in self._residual_runs.items()
            if not runs
        ]
        if (
            not found
            and self._entries
            and not any(entry.tokens for entry in self.fired.values())
            and not any(self.residual.values())
        ):
            found.append(
                f"none of the {len(self._entries)} experts of the plan was selected by any token in scope: nothing was steered"
            )
        if not found and self._residual and not self._entries and not any(self.residual.values()):
            found.append("no token was in scope of any residual vector: nothing was steered")
        return found

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per plan entry, plain JSON values; rows of several runs can be added."""
        rows: list[dict[str, Any]] = [
            {
                "kind": "expert",
                "layer": layer,
                "expert": expert,
                "gain": self._entries[layer, expert].gain,
                **fired._asdict(),
            }
            for (layer, expert), fired in self.fired.items()
        ]
        rows += [
            {
                "kind": "residual",
                "layer": entry.layer,
                "file": entry.name,
                "strength": entry.strength,
                "unit": entry.unit,
                "scope": entry.scope,
                "tokens": self.residual[index],
            }
            for index, entry in self._residual.items()
        ]
        return rows

    def summary(self) -> str:
        """One line of text per entry."""
        lines = row_lines(self.to_rows())
        return "\n".join([*lines, *self.problems()]) or "the plan is neutral: nothing was hooked"


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Audit rows as text: one line per plan entry."""
    lines = []
    for row in rows:
        if row["kind"] == "expert":
            lines.append(
                f"layer {row['layer']} expert {row['expert']} x{row['gain']:g}: selected by {row['tokens']} tokens, "
                f"weight added {row['weight_added']:.4g}"
            )
        else:
            unit = " of the residual norm" if row.get("unit") == "residual_norm" else ""
            scope = f" in scope {row['scope']}" if "scope" in row else ""
            lines.append(
                f"layer {row['layer']} vector {row['file']} x{row['strength']:g}{unit}{scope}: added to {row['tokens']} tokens"
            )
    return lines
