"""What a plan actually changed: counted on the device while it ran, read once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.entries.audit_rows import GatedActs, row_lines
from moe_steer.entries.expert_entry import ExpertGain, TopK
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.gates.conditions import When
from moe_steer.gates.counting import GateCounts
from moe_steer.inside import not_again

_ADD_UP_AT = 8192  # selections that are kept on the device before they are summed


class Fired(NamedTuple):
    """``tokens`` in scope that selected the expert; ``weight_added``: sum over them of new minus old gate weight."""

    tokens: int
    weight_added: float


class Chosen(NamedTuple):
    """``scoped`` tokens of which ``selected_before`` select the expert by themselves and ``selected_after`` under the plan."""

    scoped: int
    selected_before: int
    selected_after: int


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
    """Counts of one ``steer`` block. Entries that change nothing have no hook and are not counted."""

    def __init__(
        self,
        experts: Iterable[ExpertGain],
        residual: Iterable[ResidualVector],
        top_k: Iterable[TopK] = (),
        gates: GateCounts | None = None,
    ) -> None:
        self._entries = {(entry.layer, entry.expert): entry for entry in experts}
        self._residual = dict(enumerate(residual))
        self._top_k = {entry.layer: entry for entry in top_k}
        self._choosing: dict[int, list[int]] = {}
        for entry in self._entries.values():
            if entry.acts_on_choice:
                self._choosing.setdefault(entry.layer, []).append(entry.expert)
        self._choices: dict[int, Tensor] = {}
        self._numbers: dict[int, Tensor] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._tokens: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}
        self._seen: dict[int, int] = dict.fromkeys([*(layer for layer, _ in self._entries), *self._top_k], 0)
        self._touched: dict[int, Tensor | int] = dict.fromkeys(self._residual, 0)
        self._residual_runs: dict[int, int] = dict.fromkeys(self._residual, 0)
        self._norms: dict[int, Tensor] = {}
        self._gates = gates
        self._acts = (
            None if gates is None else GatedActs(list(self._entries.values()), self._residual, self._choosing, gates)
        )

    @not_again
    def count_experts(
        self, layer: int, num_experts: int, ids_TK: Tensor, in_scope_TK: Tensor | None, added_TK: Tensor
    ) -> None:
        """Record one forward of one layer: ids in 0..num_experts (the last means "not on this rank"); no mask means every token, one of
        [T, 1] all experts of a token.

        The caller must not change the tensors later: they are summed many forwards at a time, because a sum after every
        decode step would cost too much.
        """
        if layer not in self._top_k:
            self._seen[layer] += 1
        waiting = self._waiting.setdefault(layer, _Waiting(num_experts))
        waiting.notes.append((ids_TK, in_scope_TK, added_TK))
        waiting.size += ids_TK.numel()
        if self._acts is not None:
            self._acts.count_gains(layer, ids_TK, in_scope_TK, added_TK)
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
            everywhere = torch.ones(1, 1, dtype=torch.long, device=device)
            masks = [everywhere if mask is None else mask.long() for _, mask, _ in notes]
            counted = [mask.expand_as(ids_TK).reshape(-1) for mask, (ids_TK, _, _) in zip(masks, notes, strict=True)]
            self._tokens[layer].scatter_add_(0, ids, torch.cat(counted))
            added = torch.cat([added_TK.detach().reshape(-1).double() for _, _, added_TK in notes])
            self._added[layer].scatter_add_(0, ids, added)

    @not_again
    def count_choice(
        self,
        layer: int,
        num_experts: int,
        before_TK: Tensor,
        after_TK: Tensor,
        scopes: tuple[Tensor | None, Tensor | None],
        open_TN: Tensor | None = None,
    ) -> None:
        """Record one forward of a layer whose choice the plan changes: the ids that the router chose by itself and under the
        plan (``num_experts``: a place without a selection), and which tokens are in the plan's scope and in that of top_k.
        ``open_TN``: where the gates of the N experts of the choice are open; None: there are none."""
        with torch.no_grad():
            masks = [
                torch.ones_like(before_TK[:, 0]) if mask_T is None else mask_T.to(before_TK.device).long()
                for mask_T in scopes
            ]
            if layer in self._top_k:
                self._seen[layer] += 1
                selections = [((ids_TK < num_experts).sum(-1) * masks[1]).sum() for ids_TK in (before_TK, after_TK)]
                found = torch.stack([masks[1].sum(), *selections])
                self._numbers[layer] = self._numbers[layer] + found if layer in self._numbers else found
            if layer in self._choosing:
                experts_N = torch.tensor(self._choosing[layer], device=before_TK.device)
                counted_TN = masks[0][:, None].expand(-1, len(experts_N))
                counted_TN = counted_TN if open_TN is None else counted_TN * open_TN
                selections = [
                    ((ids_TK[:, :, None] == experts_N).any(1) * counted_TN).sum(0) for ids_TK in (before_TK, after_TK)
                ]
                if self._acts is not None:
                    self._acts.count_choice(layer, before_TK, counted_TN)
                found = torch.stack([counted_TN.sum(0), *selections])
                self._choices[layer] = self._choices[layer] + found if layer in self._choices else found

    def choosing(self, layer: int) -> list[int]:
        """The experts of a layer that act on the choice, in the order of ``open_TN``."""
        return self._choosing[layer]

    @not_again
    def count_residual(self, index: int, tokens: Tensor | int, norm: Tensor | None = None) -> None:
        """Add one forward of the residual entry number ``index``; ``norm``: the sum over tokens of the L2 norm of the change."""
        self._touched[index] = self._touched[index] + tokens
        self._residual_runs[index] += 1
        if norm is not None:
            self._norms[index] = self._norms[index] + norm if index in self._norms else norm

    @not_again
    def count_gated(self, index: int, part_T: Tensor, norm: Tensor | float) -> None:
        """Add one forward of the gated residual entry number ``index`` (``GatedActs.count_residual``)."""
        assert self._acts is not None
        self._residual_runs[index] += 1
        self._acts.count_residual(index, part_T, norm)

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
        gated = {} if self._acts is None else self._acts.residual()
        return {index: gated[index][0] if index in gated else int(n) for index, n in self._touched.items()}

    @property
    def chosen(self) -> Mapping[tuple[int, int], Chosen]:
        """(layer, expert) -> tokens in scope and selections before and after, for every entry that acts on the choice."""
        result: dict[tuple[int, int], Chosen] = {}
        for layer, experts in self._choosing.items():
            columns = self._choices[layer].T.tolist() if layer in self._choices else [[0, 0, 0]] * len(experts)
            result |= {(layer, expert): Chosen(*column) for expert, column in zip(experts, columns, strict=True)}
        return result

    @property
    def top_k(self) -> Mapping[int, Chosen]:
        """Layer of a top_k entry -> tokens in its scope, and the selections of these before and after, all experts together."""
        return {
            layer: Chosen(*self._numbers[layer].tolist()) if layer in self._numbers else Chosen(0, 0, 0)
            for layer in self._top_k
        }

    @property
    def acted(self) -> Mapping[tuple[int, int], int]:
        """(layer, expert) -> tokens at which the entry did something: at which it was selected; for an expert forced out, at
        which it would have been; for a bias on a logit, all in scope."""
        acted = {key: fired.tokens for key, fired in self.fired.items()}
        for key, chosen in self.chosen.items():
            force = self._entries[key].force
            if force != "in":
                acted[key] = chosen.selected_before if force == "out" else chosen.scoped
        return acted

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
        for key, chosen in self.chosen.items():
            wanted = {"in": chosen.scoped, "out": 0}.get(self._entries[key].force or "", chosen.selected_after)
            if not found and chosen.selected_after != wanted:
                found.append(
                    f"layer {key[0]} expert {key[1]} was {self._entries[key].action} and selected by {chosen.selected_after} of {chosen.scoped} tokens in scope"
                )
        acted = self.acted
        others = [*self.residual.values(), *(number.scoped for number in self.top_k.values())]
        entries: list[ExpertGain | ResidualVector] = [*self._entries.values(), *self._residual.values()]
        opened = " while its gate was open" if any(entry.when is not None for entry in entries) else ""
        if not found and self._entries and not any(acted.values()) and not any(others):
            what = "met a token in scope to act on" if self._choosing else "was selected by any token in scope"
            found.append(f"none of the {len(self._entries)} experts of the plan {what}{opened}: nothing was steered")
        if not found and any(self._entries[key].force == "in" and not number for key, number in acted.items()):
            found.append(f"no token was in scope of the experts that the plan forces in{opened}: nothing was forced")
        if not found and self._top_k and not self._entries and not any(others):
            found.append("no token was in scope of any top_k entry: nothing was steered")
        if not found and self._residual and not self._entries and not any(others):
            found.append(f"no token was in scope of any residual vector{opened}: nothing was steered")
        return found

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per plan entry, plain JSON values; rows of several runs can be added."""
        acted, chosen = self.acted, self.chosen
        rows: list[dict[str, Any]] = []
        for key, fired in self.fired.items():
            entry = self._entries[key]
            row = {"kind": "expert", **entry.to_dict(), **fired._asdict(), **self._opened(entry.when)}
            rows.append({**row, "tokens": acted[key], **chosen[key]._asdict()} if key in chosen else row)
        rows += [
            {"kind": "top_k", **self._top_k[layer].to_dict(), "tokens": number.scoped, **number._asdict()}
            for layer, number in self.top_k.items()
        ]
        norms = {index: float(norm) for index, norm in self._norms.items()}
        norms |= {} if self._acts is None else {index: norm for index, (_, norm) in self._acts.residual().items()}
        touched = self.residual
        for index, residual in self._residual.items():
            norm = {"norm_added": norms[index]} if index in norms else {}
            rows.append(residual.audit_row() | {"tokens": touched[index], **norm, **self._opened(residual.when)})
        return rows

    def _opened(self, when: When | None) -> dict[str, Any]:
        return (
            {} if when is None or self._gates is None else {"when": str(when), **self._gates.openings(when)._asdict()}
        )

    def to_samples(self) -> dict[Any, list[dict[str, Any]]]:
        """What callers call their rows (``FollowsRows.name_rows``) -> of every gated entry what it did in that row, prompt included:
        ``row``, its place in ``to_rows``; how often its gate opened, at how many tokens it was open; at how many the entry acted, and what
        it added. A row that ended with its first token is not there: no generated token was processed."""
        return {} if self._acts is None else self._acts.by_sample(between=len(self._top_k))

    def summary(self) -> str:
        """One line of text per entry."""
        lines = row_lines(self.to_rows())
        return "\n".join([*lines, *self.problems()]) or "the plan is neutral: nothing was hooked"
