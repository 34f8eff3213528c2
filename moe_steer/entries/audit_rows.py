"""Rows of an audit: what the gated entries of a plan did, row by row, in all and of each sample; and rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_steer.entries.expert_entry import EXPERT_KEYS, ExpertGain
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.gates.counting import GateCounts, RowSums
from moe_steer.tokens.cache_rows import RowName


class GatedActs:
    """Counts of one ``steer`` block. ``residual``: the entries by their numbers in the audit; ``choosing``: layer -> its experts that act
    on the choice."""

    def __init__(
        self,
        experts: Sequence[ExpertGain],
        residual: Mapping[int, ResidualVector],
        choosing: Mapping[int, list[int]],
        gates: GateCounts,
    ) -> None:
        self._gates = gates
        self._experts, self._residual, self._choosing = list(experts), dict(residual), choosing
        self._gained: dict[int, list[int]] = {}
        """Layer -> its experts with a gate."""
        for entry in self._experts:
            if entry.when is not None:
                self._gained.setdefault(entry.layer, []).append(entry.expert)
        self._gains = {layer: RowSums(partial(_gains, ids), 2 * len(ids)) for layer, ids in self._gained.items()}
        self._choices = {
            layer: RowSums(partial(_choices, ids), 2 * len(ids))
            for layer, ids in self._choosing.items()
            if layer in self._gained
        }
        self._changes = {index: RowSums(_changes, 2) for index, entry in residual.items() if entry.when is not None}
        self._lengths = dict.fromkeys(self._changes, 1.0)

    def count_gains(self, layer: int, ids_TK: Tensor, in_scope_TK: Tensor | None, added_TK: Tensor) -> None:
        """Record a forward of a layer: the experts of each token, where the plan acts on them ([T, K] or [T, 1]), and what it adds to
        their weights."""
        if layer in self._gains and in_scope_TK is not None:
            self._gains[layer].note(self._gates.names, ids_TK, in_scope_TK, added_TK)

    def count_choice(self, layer: int, before_TK: Tensor, counted_TN: Tensor) -> None:
        """Record a forward of a layer whose choice the plan changes: the router's own, and where the plan acts on each expert."""
        if layer in self._choices:
            self._choices[layer].note(self._gates.names, before_TK, counted_TN)

    def count_residual(self, index: int, part_T: Tensor, norm: Tensor | float) -> None:
        """Record a forward of an entry: with which part it acts at each token (0: not at all), and the L2 norm of what it changes: of
        the whole of it, or, a tensor, at each token."""
        if isinstance(norm, float):
            self._lengths[index] = norm
        self._changes[index].note(self._gates.names, part_T, part_T if isinstance(norm, float) else norm)

    def residual(self) -> dict[int, tuple[int, float]]:
        """Number of each gated residual entry -> the tokens at which it acted, and the sum over them of the L2 norm of the change."""
        found = {index: sums.total() for index, sums in self._changes.items()}
        return {index: (int(tokens), self._lengths[index] * parts) for index, (tokens, parts) in found.items()}

    def by_sample(self, between: int) -> dict[Any, list[dict[str, Any]]]:
        """What callers call their rows -> of every gated entry what it did in that row, as ``Audit.to_samples`` says. ``between``: rows
        of the audit between those of experts and those of residual entries."""
        experts = {place: (one.when, one) for place, one in enumerate(self._experts)}
        start = len(self._experts) + between
        residual = {start + at: (self._residual[index].when, index) for at, index in enumerate(self._residual)}
        return {
            sample: [
                {"row": place, **self._gates.of_row(when, name), **self._acts(entry, name)}
                for place, (when, entry) in (experts | residual).items()
                if when is not None
            ]
            for sample, name in self._gates.samples().items()
        }

    def _acts(self, entry: ExpertGain | int, name: RowName) -> dict[str, Any]:
        """Of an expert's entry or of a residual one's number."""
        if isinstance(entry, int):
            tokens, parts = self._changes[entry].of_row(name)
            return {"tokens": int(tokens), "norm_added": self._lengths[entry] * parts}
        place = 2 * self._gained[entry.layer].index(entry.expert)
        tokens, added = self._gains[entry.layer].of_row(name)[place : place + 2]
        if entry.acts_on_choice and entry.force != "in":
            place = 2 * self._choosing[entry.layer].index(entry.expert) + (entry.force == "out")
            tokens = self._choices[entry.layer].of_row(name)[place]
        return {"tokens": int(tokens), "weight_added": added}


def _gains(experts: Sequence[int], ids_TK: Tensor, in_scope_TK: Tensor, added_TK: Tensor) -> Tensor:
    """[T, 2N]: whether the token selected an expert where the plan acts, and what that added to its weight."""
    columns = []
    for expert in experts:
        here_TK = ids_TK == expert
        columns += [(here_TK & in_scope_TK).sum(-1).double(), (added_TK.double() * here_TK).sum(-1)]
    return torch.stack(columns, 1)


def _choices(experts: Sequence[int], before_TK: Tensor, counted_TN: Tensor) -> Tensor:
    """[T, 2N]: whether the plan acts on the choice of an expert, and whether the router selected it there by itself."""
    columns = []
    for place, expert in enumerate(experts):
        counted_T = counted_TN[:, place].double()
        columns += [counted_T, counted_T * (before_TK == expert).any(1)]
    return torch.stack(columns, 1)


def _changes(part_T: Tensor, norm_T: Tensor) -> Tensor:
    part_T, norm_T = part_T.reshape(-1), norm_T.reshape(-1)
    return torch.stack([(part_T > 0).double(), norm_T.double()], 1)


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Audit rows as text: one line per plan entry."""
    lines: list[str] = []
    for row in rows:
        if row["kind"] == "top_k" or "scoped" in row:
            who = f"top {row['k']}" if row["kind"] == "top_k" else f"expert {row['expert']} {_action(row)}"
            lines.append(
                f"layer {row['layer']} {who}: {row['scoped']} tokens in scope, selections {row['selected_before']} before and "
                f"{row['selected_after']} after{_added(row) if row.get('gain', 1.0) != 1.0 else ''}"
            )
        elif row["kind"] == "expert" and "gain" not in row:  # a choice, by a server's count
            lines.append(f"layer {row['layer']} expert {row['expert']} {_action(row)}: at {row['tokens']} tokens")
        elif row["kind"] == "expert":
            lines.append(
                f"layer {row['layer']} expert {row['expert']} x{row['gain']:g}: selected by {row['tokens']} tokens{_added(row)}"
            )
        else:
            unit = " of the residual norm" if row.get("unit") == "residual_norm" else ""
            scope = f" in scope {row['scope']}" if "scope" in row else ""
            lines.append(
                f"layer {row['layer']} vector {row['file']} x{row['strength']:g}{unit}{scope}: added to {row['tokens']} tokens"
            )
    return [line + _openings(row) for line, row in zip(lines, rows, strict=True)]


def _added(row: Mapping[str, Any]) -> str:
    """The weight that a gain added; servers do not count it."""
    return f", weight added {row['weight_added']:.4g}" if "weight_added" in row else ""


def _action(row: Mapping[str, Any]) -> str:
    said = {key: row[key] for key in EXPERT_KEYS if key in row and key != "when"}
    return ExpertGain(**said).action


def _openings(row: Mapping[str, Any]) -> str:
    """What the audit row of a gated entry says of its gate, to follow on its line; empty for other rows."""
    if "openings" not in row:
        return ""
    norm = f", changed by a norm of {row['norm_added']:.4g} in all" if "norm_added" in row else ""
    return (
        f"{norm}; gate {row['when']}: opened {row['openings']} times in {row['opened_rows']} of {row['rows']} rows"
        f" ({row['reopened_rows']} of them more than once)"
    )
