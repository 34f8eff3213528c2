"""How often gates open, and sums over the tokens of each row: kept on the device while a model runs, worked out many forwards at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.gates.conditions import When
from moe_steer.tokens.cache_rows import RowName, Tokens

_MOST_FORWARDS, _MOST_TOKENS = 256, 65536
Names = tuple[RowName, ...]


class RowSums:
    """Row -> sums over its tokens. ``of``: makes numbers [T, C] of the tensors of a forward, each with T as its first dimension."""

    def __init__(self, of: Callable[..., Tensor], columns: int) -> None:
        self._of, self._columns = of, columns
        self._waiting: list[tuple[Names, tuple[Tensor, ...]]] = []
        self._tokens = 0
        self._sums: dict[RowName, list[float]] = {}

    def note(self, names: Names, *tensors: Tensor) -> None:
        """Record a forward: T = B*S tokens, row by row. The caller must not change the tensors later."""
        self._waiting.append((names, tensors))
        self._tokens += len(tensors[0])
        if len(self._waiting) >= _MOST_FORWARDS or self._tokens >= _MOST_TOKENS:
            self._add_up()

    @property
    def sums(self) -> dict[RowName, list[float]]:
        """The sums so far, rows in the order in which they came."""
        self._add_up()
        return self._sums

    def total(self) -> list[float]:
        """Over all rows."""
        return self._sum(self.sums)

    def of_row(self, name: RowName) -> list[float]:
        """Of a row, with what was in it before it had this name."""
        return self._sum((name, *before(name)))

    def _sum(self, names: Iterable[RowName]) -> list[float]:
        sums = self.sums
        found = [sums[name] for name in names if name in sums]
        return [math.fsum(row[column] for row in found) for column in range(self._columns)]

    def _add_up(self) -> None:
        waiting, self._waiting, self._tokens = self._waiting, [], 0
        with torch.no_grad():
            for _, group in itertools.groupby(waiting, lambda note: (id(note[0]), len(note[1][0]))):
                forwards = list(group)
                names = forwards[0][0]
                tensors = (torch.cat(column) for column in zip(*(note for _, note in forwards), strict=True))
                value_NC = self._of(*tensors)
                sums_BC = value_NC.view(len(forwards), len(names), -1, value_NC.shape[-1]).sum((0, 2)).tolist()
                for name, sums in zip(names, sums_BC, strict=True):
                    old = self._sums.get(name)
                    self._sums[name] = sums if old is None else [a + b for a, b in zip(old, sums, strict=True)]


def before(name: RowName) -> Iterator[RowName]:
    """All earlier names of a row."""
    found: set[RowName] = set()
    waiting = list(name.parents)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            yield one
            waiting += one.parents


class Openings(NamedTuple):
    """``rows``: that have generated a token; ``opened_rows``: those of them in which the gate opened; ``reopened_rows``: more than
    once; ``openings``: in all of them together."""

    rows: int
    opened_rows: int
    reopened_rows: int
    openings: int


class GateCounts:
    """Counts of the gates of one ``steer`` block. Rows are counted once they have generated a token, with what was in their prompt;
    copies on which something is tried are not."""

    def __init__(self, whens: Iterable[When]) -> None:
        self._whens = list(dict.fromkeys(whens))
        self._opened = [RowSums(_openings, 2) for _ in self._whens]
        self._prompted = RowSums(lambda generated_T: generated_T[:, None].double(), 1)
        self._generating: dict[RowName, None] = {}
        self._decoding: Names = ()
        self.names: Names = ()
        """Of the rows of the forward that runs, or ran last."""

    def begin(self, names: Names, tokens: Tokens) -> None:
        """The rows and tokens of the forward that runs from here on."""
        if tokens.has_prompt:
            self._prompted.note(names, ((tokens.number_BS >= 0) & tokens.real_BS).reshape(-1))
        elif names is not self._decoding:
            self._generating.update(dict.fromkeys(names))
            self._decoding = names
        self.names = names

    def count_gate(self, number: int, before_T: Tensor, after_T: Tensor) -> None:
        """Whether gate ``number`` was open (not 0) before each token, and at it."""
        self._opened[number].note(self.names, before_T, after_T)

    def openings(self, when: When) -> Openings:
        """The counts of a gate so far."""
        opened = self._opened[self._whens.index(when)]
        generated = self._generated()
        first = [name for name in generated if not any(one in generated for one in before(name))]
        counts = [opened.of_row(name)[0] for name in first]
        later = [opened.sums[name][0] for name in generated.keys() - first if name in opened.sums]
        several = sum(count > 1 for count in counts)
        return Openings(len(first), sum(count > 0 for count in counts), several, int(sum(counts) + sum(later)))

    def samples(self) -> dict[Any, RowName]:
        """What callers call their rows -> the last row of that name that has generated a token."""
        return {name.sample: name for name in self._generated() if name.sample is not None}

    def of_row(self, when: When, name: RowName) -> dict[str, int]:
        """How often a gate opened in a row, and at how many of its tokens it was open, the prompt's included."""
        openings, open_tokens = map(int, self._opened[self._whens.index(when)].of_row(name))
        return {"openings": openings, "open_tokens": open_tokens}

    def _generated(self) -> dict[RowName, None]:
        prompted = [name for name, (number,) in self._prompted.sums.items() if number]
        return {name: None for name in [*prompted, *self._generating] if not name.apart}


def _openings(before_T: Tensor, after_T: Tensor) -> Tensor:
    open_T = after_T.reshape(-1) > 0
    return torch.stack([open_T & (before_T.reshape(-1) == 0), open_T], 1).double()
