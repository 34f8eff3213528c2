"""How often gates open, counted on the device while they run, read once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.gates.conditions import When

_FLUSH_AT = 256
_MOST = 64
"""Rows that have opened a gate more often count as having opened it so often, for the number of rows alone."""


class Openings(NamedTuple):
    """``rows``: that have generated a token; ``opened_rows``: those of them in which the gate opened; ``reopened_rows``: more than
    once; ``openings``: in all of them together."""

    rows: int
    opened_rows: int
    reopened_rows: int
    openings: int


class GateCounts:
    """Counts of the gates of one ``steer`` block."""

    def __init__(self, whens: Iterable[When]) -> None:
        self._whens = list(dict.fromkeys(whens))
        self._waiting: list[list[tuple[Tensor, ...]]] = [[] for _ in self._whens]
        self._rows: dict[int, Tensor] = {}
        self._openings: dict[int, Tensor] = {}

    def count_gate(
        self, number: int, before_B: Tensor, after_B: Tensor, generated: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Record a forward: how often gate ``number`` had opened in each row before and after it. ``generated``: the row's tokens before
        it and behind it, and those of its prompt: a row counts once it has generated one. The caller must not change the tensors later."""
        waiting = self._waiting[number]
        waiting.append((before_B, after_B, *generated))
        if len(waiting) >= _FLUSH_AT:
            self._add_up(number)

    def openings(self, when: When) -> Openings:
        """The counts of a gate so far."""
        number = self._whens.index(when)
        self._add_up(number)
        if number not in self._rows:
            return Openings(0, 0, 0, 0)
        rows = self._rows[number].tolist()
        return Openings(sum(rows), sum(rows[1:]), sum(rows[2:]), int(self._openings[number]))

    def _add_up(self, number: int) -> None:
        waiting, self._waiting[number] = self._waiting[number], []
        if not waiting:
            return
        with torch.no_grad():
            before, after, first, last, prompt = (torch.cat(column) for column in zip(*waiting, strict=True))
            was, now = first > prompt, last > prompt
            rows = torch.zeros(_MOST + 1, dtype=torch.long, device=after.device)
            # A row moves from the place of its old number of openings to that of the new one, once it has generated a token.
            rows = rows.scatter_add(0, after.clamp(max=_MOST), now.long())
            rows = rows.scatter_add(0, before.clamp(max=_MOST), -was.long())
            openings = (after * now - before * was).sum()
        self._rows[number] = self._rows[number] + rows if number in self._rows else rows
        self._openings[number] = self._openings[number] + openings if number in self._openings else openings


def opening_line(row: Mapping[str, Any]) -> str:
    """What the audit row of a gated entry says of its gate, to follow on its line; empty for other rows."""
    if "openings" not in row:
        return ""
    norm = f", changed by a norm of {row['norm_added']:.4g} in all" if "norm_added" in row else ""
    return (
        f"{norm}; gate {row['when']}: opened {row['openings']} times in {row['opened_rows']} of {row['rows']} rows"
        f" ({row['reopened_rows']} of them more than once)"
    )
