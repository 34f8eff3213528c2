"""The gates of a plan in a running model: their numbers, states and factors, forward after forward, with hysteresis and ramps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_steer.gates.conditions import CONFIDENT, Condition, When
from moe_steer.gates.counting import GateCounts
from moe_steer.gates.probe import Probe
from moe_steer.gates.values import Confidence, Probed, Source, State, source_of
from moe_steer.tokens.cache_rows import Rows, Tokens, rows_on
from moe_steer.tokens.positions import carried


def holds(condition: Condition, value_BS: Tensor, open_B1: Tensor, real_BS: Tensor | None) -> Tensor:
    """bool [B, S]: whether the condition is open at each token; ``open_B1``: before them. Padding (None: there is none, and one token a
    row) has what was before it."""
    if condition.above is not None:
        opens_BS, closes_BS = value_BS >= condition.opens, value_BS < condition.closes
    else:
        opens_BS, closes_BS = value_BS <= condition.opens, value_BS > condition.closes
    if real_BS is None:
        return opens_BS.logical_or_(open_B1 > closes_BS)  # was open and is not closed
    return carried(open_B1[:, 0], opens_BS, (opens_BS | closes_BS) & real_BS)[:, 1:]


def tokens_open(open_BS: Tensor, count_B1: Tensor, real_BS: Tensor | None) -> Tensor:
    """[B, S]: the number of the token since the gate opened, from 1; 0 where it is closed. ``count_B1``: of the token before;
    ``real_BS``: as for ``holds``."""
    if real_BS is None:
        return (count_B1 + 1).mul_(open_BS)
    count_B = count_B1[:, 0].long()
    number_BS = real_BS.long().cumsum(1)
    # The place of the latest closed token, counted from these tokens' start; before them it was count_B tokens ago.
    closed_BS = carried(-count_B, number_BS, ~open_BS & real_BS)[:, 1:]
    return number_BS - closed_BS


_NUMBERS = itertools.count()
_SCOPES = {"spent": "thought", "paragraphs_since": "step_end:paragraph"}
_READ_IDS = ("loop", "paragraphs_since")


class ExpertParts(NamedTuple):
    """Of the experts that tokens selected, ids_TK (the number of experts: none of them): where their gates are open, bool [T, K] or
    [T, 1], and with which part of their gains they act (0 where they are closed); None: with all of them."""

    opened: Callable[[Tensor], Tensor]
    part: Callable[[Tensor], Tensor] | None


class GatedExpert(Protocol):
    """An entry on an expert."""

    @property
    def expert(self) -> int: ...

    @property
    def when(self) -> When | None: ...


class Gates:
    """Factors of the gates of one ``steer`` block. The rows' states lie on the cache, as those of scopes do."""

    def __init__(
        self,
        whens: Iterable[When],
        probe: Callable[[str], Probe],
        forms: Callable[[str], Sequence[Any]],
        counts: GateCounts,
    ) -> None:
        self._whens = list(dict.fromkeys(whens))
        self._conditions = list(dict.fromkeys(one for when in self._whens for one in when.conditions))
        self._sources: dict[tuple[Any, ...], Source] = {}
        for one in self._conditions:
            if one.source not in self._sources:
                self._sources[one.source] = source_of(one, probe, forms)
        self._key = f"gates{next(_NUMBERS)}/"
        self._counts = counts
        self._names = [f"{self._key}w{number}" for number in range(len(self._whens))]
        self._condition_names = [f"{self._key}c{number}" for number in range(len(self._conditions))]
        self._own = [*self._names, *self._condition_names]
        self._of_source = [
            {short: f"{self._key}{number}/{short}" for short in source.fresh(1, torch.device("cpu"))}
            for number, source in enumerate(self._sources.values())
        ]
        self._state: State = {}
        self._ended: State = {}
        self._parts: list[State] = [{} for _ in self._sources]
        self._seen: Tokens | None = None
        self._real_BS: Tensor | None = None
        self._opens: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        self._open: dict[int, Tensor] = {}
        self._parts_of = [[self._conditions.index(one) for one in when.conditions] for when in self._whens]
        self._source_of = [self._sources[one.source] for one in self._conditions]
        self._reads_ids = any(one.on in _READ_IDS for one in self._conditions)

    @property
    def scopes(self) -> set[str]:
        """The scopes whose tokens must be known."""
        return {_SCOPES[one.on] for one in self._conditions if one.on in _SCOPES}

    @property
    def reads_ids(self) -> bool:
        """Whether token ids must be given."""
        return self._reads_ids

    @property
    def reads_logits(self) -> bool:
        """Whether ``take_logits`` must be called."""
        return any(one.on in CONFIDENT for one in self._conditions)

    @property
    def readers(self) -> Mapping[int, Callable[[Tensor], None]]:
        """Layer -> what must be called with its output, before anything acts on it."""
        found: dict[int, list[Probed]] = {}
        for source in self._sources.values():
            if isinstance(source, Probed):
                found.setdefault(source.probe.layer, []).append(source)

        def reader(probed: list[Probed]) -> Callable[[Tensor], None]:
            def read(hidden_BSD: Tensor) -> None:
                for one in probed:
                    one.read(hidden_BSD)

            return read

        return {layer: reader(probed) for layer, probed in found.items()}

    def begin(self, tokens: Tokens, rows: Rows) -> None:
        """Take the tokens of a forward and the rows as they were before it."""
        if self._reads_ids and tokens.ids_BS is None:
            raise ValueError(
                "a gate on loop or paragraphs_since needs token ids: call the model with input_ids, not embeddings"
            )
        self._seen, self._factors, self._open, self._opens = tokens, {}, {}, {}
        if rows.forwards == 0:
            state: Mapping[str, Tensor] = self._fresh(len(rows.seen_B), rows.seen_B.device)
        else:
            state = rows.gates
            if self._names[0] not in state:
                raise ValueError(
                    "the cache was filled before steer() was entered: run the prompt inside the with-block"
                )
        self._state = {name: state[name] for name in self._own}
        # A row that decodes one token has no padding in it.
        self._real_BS = tokens.real_BS if tokens.has_prompt else None
        self._counts.begin(rows.names, tokens)
        for number, (source, names) in enumerate(zip(self._sources.values(), self._of_source, strict=True)):
            self._parts[number] = {short: state[full] for short, full in names.items()}
            source.begin(tokens, self._parts[number])

    def number_of(self, when: When) -> int:
        """The number by which ``opened`` and ``factor`` know a gate."""
        return self._whens.index(when)

    def opened(self, number: int) -> Tensor:
        """bool [T, 1]: where gate ``number`` is open; nowhere at padding."""
        if number not in self._opens:
            self._advance(number)
        return self._opens[number]

    def factor(self, number: int) -> Tensor | None:
        """float32 [T, 1], 0 to 1: with how much of its entry a gate acts at each token; 0 where it is closed, and at padding. None of a
        gate without a ramp: with all of it where it is open."""
        if number not in self._opens:
            self._advance(number)
        return self._factors.get(number)

    def _advance(self, number: int) -> None:
        """Work out a gate at the tokens of this forward, once."""
        if self._seen is None:
            raise RuntimeError("a gate needs the whole model to run: a layer was called on its own")
        when, real_BS, name = self._whens[number], self._real_BS, self._names[number]
        joined_BS, *others = (self._open_of(one) for one in self._parts_of[number])
        for open_BS in others:
            joined_BS = joined_BS & open_BS if when.joined == "all" else joined_BS | open_BS
        was_B1, count_BS = self._state[name], None
        if real_BS is not None or when.ramp > 1:
            count_BS = tokens_open(joined_BS, was_B1, real_BS)
        # Of a gate without a ramp the state is whether it is open, else for how many tokens.
        state_BS = joined_BS if count_BS is None or when.ramp == 1 else count_BS
        self._state[name] = state_BS if real_BS is None else state_BS[:, -1:]
        was_BS = was_B1
        if real_BS is not None:
            assert count_BS is not None
            was_BS, joined_BS = (count_BS != 1) | ~real_BS, joined_BS & real_BS
        self._opens[number] = joined_BS if real_BS is None else joined_BS.reshape(-1, 1)
        self._counts.count_gate(number, was_BS.reshape(-1, 1) if real_BS is not None else was_BS, self._opens[number])
        if when.ramp > 1:
            assert count_BS is not None
            factor_BS = (count_BS / when.ramp).clamp_(max=1.0)
            self._factors[number] = factor_BS if real_BS is None else (factor_BS * joined_BS).reshape(-1, 1)

    def of_experts(self, entries: Sequence[GatedExpert], num_experts: int) -> ExpertParts | None:
        """The gates of the entries on one layer's experts; None where none has one."""
        numbers = sorted({self.number_of(entry.when) for entry in entries if entry.when is not None})
        if not numbers:
            return None
        ramps = any(self._whens[number].ramp > 1 for number in numbers)
        if len(numbers) == 1 and all(entry.when is not None for entry in entries):
            only = numbers[0]
            return ExpertParts(lambda _: self.opened(only), (lambda _: self.part(only)) if ramps else None)
        column_E = torch.zeros(num_experts + 1, dtype=torch.long)
        for entry in entries:
            if entry.when is not None:
                column_E[entry.expert] = 1 + numbers.index(self.number_of(entry.when))
        tables: dict[torch.device, Tensor] = {}

        def gathered(of: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
            def parts(ids_TK: Tensor) -> Tensor:
                if (device := ids_TK.device) not in tables:
                    tables[device] = column_E.to(device)
                columns = [of(number).to(device) for number in numbers]
                return torch.cat([torch.ones_like(columns[0]), *columns], 1).gather(1, tables[device][ids_TK])

            return parts

        return ExpertParts(gathered(self.opened), gathered(self.part) if ramps else None)

    def part(self, number: int) -> Tensor:
        """``factor``, of a gate without a ramp too: 1 where it is open."""
        part_T1 = self.factor(number)
        return self.opened(number).float() if part_T1 is None else part_T1

    def end(self) -> State:
        """The rows' state behind the forward, for the cache."""
        for number in range(len(self._whens)):
            self.opened(number)
        self._seen = None
        state = dict(self._state)
        for part, names in zip(self._parts, self._of_source, strict=True):
            for short, full in names.items():
                state[full] = part[short]
        self._ended = state
        return state

    def take_logits(self, logits_BSV: Tensor, cache: Any) -> None:
        """Keep what the newest token's logits say for the next forward."""
        rows = rows_on(cache)
        if rows is None or self._names[0] not in rows.gates:
            return
        found = {
            names["value_B1"]: source.of(logits_BSV[:, -1]).to(rows.seen_B.device)
            for names, source in zip(self._of_source, self._sources.values(), strict=True)
            if isinstance(source, Confidence)
        }
        if rows.gates is self._ended:  # nobody else has it
            self._ended.update(found)
        else:
            cache.steering_rows = dataclasses.replace(rows, gates={**rows.gates, **found})

    def _open_of(self, number: int) -> Tensor:
        assert self._seen is not None
        if number not in self._open:
            one, value_BS = self._conditions[number], self._source_of[number].value_BS
            if value_BS is None:
                raise RuntimeError(f"the gate on {one} was asked before the layer of its probe had run")
            name = self._condition_names[number]
            open_BS = self._open[number] = holds(one, value_BS, self._state[name], self._real_BS)
            self._state[name] = open_BS if self._real_BS is None else open_BS[:, -1:]
        return self._open[number]

    def _fresh(self, num_rows: int, device: torch.device) -> State:
        closed_B1 = torch.zeros((num_rows, 1), dtype=torch.bool, device=device)
        state: State = dict.fromkeys(self._own, closed_B1)
        for when, name in zip(self._whens, self._names, strict=True):
            if when.ramp > 1:
                state[name] = closed_B1.long()
        for source, names in zip(self._sources.values(), self._of_source, strict=True):
            for short, value in source.fresh(num_rows, device).items():
                state[names[short]] = value
        return state


def logits_of(output: Any) -> Tensor:
    """The logits [B, S, V] that a model with a head returns."""
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
