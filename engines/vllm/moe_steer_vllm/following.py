"""Requests as they come, are batched, preempted and go: which plan each token of a batch runs under, and what each request hit.

Per step and on the device: a few numbers a request go up, the tokens' rows are computed there. Batches without a steered request
touch nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_steer.tokens import Batch, RaggedScopes, RowState, SpecialTokens
from moe_steer_vllm.served import Asked, Served, channels, entries
from moe_steer_vllm.tables import TokenRows, first_columns

REMEMBERED = 10_000
"""Finished requests whose hits can be asked for."""
_MOST_CELLS = 4_000_000


@dataclass
class _Live:
    """A steered request. ``slot`` 0: it has none at present; ``kept``: its hits from before it lost its slot, or when it ended."""

    request: str
    asked: Asked
    row: int
    slot: int = 0
    next: int = 0
    tokens: int = 0
    kept: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """R requests of a batch, in order. ``history``: (which of them, n) -> ids of its first n tokens."""

    requests: Sequence[str]
    count_R: np.ndarray[Any, Any]
    before_R: np.ndarray[Any, Any]
    prompt_R: np.ndarray[Any, Any]
    history: Callable[[int, int], Tensor]


class Following:
    """Everything of one model runner that changes from step to step."""

    def __init__(
        self,
        served: Served,
        special: SpecialTokens | None,
        num_tokens: int,
        num_requests: int,
        device: torch.device | str,
        eager: bool = False,
    ) -> None:
        self.served = served
        self.routers: dict[int, str] = {}
        """Layer -> the class of its router, where one is steered."""
        self._plans = list(served.plans.values())
        self._names = list(served.plans)
        self._device = torch.device(device)
        self.tokens = TokenRows.of(self._plans, num_tokens, num_requests + 1, device, eager)
        scopes = sorted(served.scopes)
        self._scopes = RaggedScopes(scopes, special, device)
        self._state = RowState.of_new_rows(num_requests + 1, special, device)
        self._new = RowState.of_new_rows(1, special, device)
        # Of each channel and plan the number of its scope; the last one, nowhere, for row 0 and channels that a plan has not.
        table = torch.full((len(self.tokens.rows_CN), len(self._plans) + 1), len(scopes))
        for row, plan in enumerate(self._plans, 1):
            for channel, scope in enumerate(channels(plan)):
                table[channel, row] = scopes.index(scope)
        self._scope_CP = table.to(device)
        self._free = list(range(num_requests, 0, -1))
        self._live: dict[str, _Live] = {}
        self._before: tuple[list[str], bytes] | None = None  # a batch whose rows are those of the next one like it
        self._everywhere = {name: channels(plan) == ["all"] for name, plan in served.plans.items()}
        size = max(1, min(REMEMBERED, _MOST_CELLS // self.tokens.width))
        self._done = torch.zeros(size, self.tokens.width, dtype=torch.long, device=device)
        self._done_of: list[_Live | None] = [None] * size
        self._next_done = 0
        self._of_reply: dict[str, list[_Live]] = {}
        self._totals = torch.zeros(self.tokens.width, dtype=torch.long, device=device)
        self._total_tokens = dict.fromkeys(self._names, 0)

    def come(self, request: str, extra: Any) -> None:
        """A request was added; one that comes again after it was preempted is known."""
        asked = self.served.asked(extra)
        if asked is not None and request not in self._live:
            live = self._live[request] = _Live(request, asked, self._names.index(asked.name) + 1)
            for reply in replies_of(request):
                self._of_reply.setdefault(reply, []).append(live)

    def go(self, requests: Iterable[str]) -> None:
        """Requests have ended."""
        for live in [self._live.pop(name) for name in requests if name in self._live]:
            hits = self._hits(live)
            self._park(live)
            self._totals += hits
            self._total_tokens[live.asked.name] += live.tokens
            at = self._next_done % len(self._done)
            self._forget(self._done_of[at])
            self._done[at], self._done_of[at] = hits, live
            live.kept = self._done[at]
            self._next_done += 1

    def _forget(self, live: _Live | None) -> None:
        for reply in replies_of(live.request) if live is not None else ():
            self._of_reply[reply] = [other for other in self._of_reply[reply] if other is not live]
            if not self._of_reply[reply]:
                del self._of_reply[reply]

    def neutral(self) -> None:
        """Let the rows say that no token is steered."""
        if self.tokens.written:
            self.tokens.clear(0, self.tokens.written)
            self.tokens.written = 0
        self._before = None

    def rehearse(self) -> None:
        """Before a run of the engine's own, by which it measures the memory of a forward: no token is steered, and the tables are read."""
        self.neutral()
        self.tokens.written = 1

    def step(self, step: Step, ids: Callable[[], Tensor]) -> None:
        """Write the rows of a batch. ``ids``: the tokens' ids, asked for only where a scope reads them."""
        found = [self._live.get(request) for request in step.requests] if self._live else []
        if not any(found):
            self.neutral()
            return
        if self._as_before(step, found):
            return
        here = {live.request for live in found if live is not None}
        for live in found:
            if live is not None and not live.slot:
                self._place(live, here)
        self._rebuild(step, found)
        numbers = np.zeros((5, len(found)), dtype=np.int64)
        doses = np.ones(len(found), dtype=np.float32)
        numbers[0], numbers[1], numbers[2] = step.count_R, step.before_R, step.prompt_R
        for r, live in enumerate(found):
            if live is not None:
                numbers[3, r], numbers[4, r], doses[r] = live.row, live.slot, live.asked.dose
        self._advance(step, found)
        count_R, before_R, prompt_R, row_R, slot_R = self._up(torch.from_numpy(numbers))
        dose_R = self._up(torch.from_numpy(doses))
        num_tokens = int(step.count_R.sum())
        batch = Batch.of(count_R, before_R, prompt_R, num_tokens)
        read = self._scopes.follows_tags
        ids_T = ids()[:num_tokens].long() if read else count_R.new_empty(0)
        masks_ST, after = self._scopes.masks(batch, ids_T, RowState(*(part[slot_R] for part in self._state)))
        if read:
            for whole, part in zip(self._state, after, strict=True):
                whole[slot_R] = part  # unsteered ones share slot 0, which nobody reads
        masks_ST = torch.cat([masks_ST, torch.zeros_like(masks_ST[:1])])
        row_T = row_R[batch.row_T]
        inside_CT = masks_ST.gather(0, self._scope_CP[:, row_T])
        if self.tokens.written > num_tokens:
            self.tokens.clear(num_tokens, self.tokens.written)
        self.tokens.rows_CN[:, :num_tokens] = row_T * inside_CT
        self.tokens.dose_N[:num_tokens] = dose_R[batch.row_T]
        base_T = torch.where(row_T > 0, slot_R[batch.row_T] * self.tokens.width, self.tokens.spare_N[:num_tokens])
        self.tokens.base_N[:num_tokens] = base_T
        self.tokens.written = num_tokens
        if all(live is None or self._everywhere[live.asked.name] for live in found):
            self._before = (list(step.requests), step.count_R.tobytes())

    def _as_before(self, step: Step, found: Sequence[_Live | None]) -> bool:
        """Whether a batch has the rows of the last one: the same requests and counts, under plans in scope all. Most steps are."""
        same = self._before is not None and self._before == (list(step.requests), step.count_R.tobytes())
        if not same or any(live is not None and not live.slot for live in found):
            self._before = None
            return False
        self._advance(step, found)
        return True

    def _advance(self, step: Step, found: Sequence[_Live | None]) -> None:
        for live, before, count in zip(found, step.before_R.tolist(), step.count_R.tolist(), strict=True):
            if live is not None:
                live.next = before + count
                live.tokens += count

    def _up(self, values: Tensor) -> Tensor:
        return (values.pin_memory() if self._device.type == "cuda" else values).to(self._device, non_blocking=True)

    def _place(self, live: _Live, here: set[str]) -> None:
        if not self._free:
            self._park(next(other for other in self._live.values() if other.slot and other.request not in here))
        live.slot = self._free.pop()
        if live.kept is not None:
            self.tokens.counts()[live.slot] = live.kept
            live.kept = None
        live.next = -1  # what it has behind it is read again

    def _park(self, live: _Live) -> None:
        """Take a request's slot."""
        if live.slot:
            live.kept = self.tokens.counts()[live.slot].clone()
            self.tokens.counts()[live.slot] = 0
            self._free.append(live.slot)
            live.slot = 0

    def _hits(self, live: _Live) -> Tensor:
        if live.slot:
            return self.tokens.counts()[live.slot].clone()
        return torch.zeros_like(self._totals) if live.kept is None else live.kept

    def _rebuild(self, step: Step, found: Sequence[_Live | None]) -> None:
        """What a request has behind it, where the last step was not its own: it is new, some of it came from the prefix cache, or
        it is computed again."""
        if not self._scopes.follows_tags:
            return
        for r, live in enumerate(found):
            before = int(step.before_R[r])
            if live is None or live.next == before or self._everywhere[live.asked.name]:
                continue
            state = self._new
            if before:
                count, none, prompt = (
                    torch.tensor([n], device=self._device) for n in (before, 0, int(step.prompt_R[r]))
                )
                ids_T = step.history(r, before).to(self._device).long()
                _, state = self._scopes.masks(Batch.of(count, none, prompt, before), ids_T, state)
            for whole, part in zip(self._state, state, strict=True):
                whole[live.slot] = part[0]

    def status(self) -> dict[str, Any]:
        """Hits and tokens of every plan since the start."""
        totals, tokens = self._totals.clone(), dict(self._total_tokens)
        for live in self._live.values():
            totals += self._hits(live)
            tokens[live.asked.name] += live.tokens
        numbers = totals.tolist()
        firsts = first_columns(self._plans)
        return {
            name: {"hits": numbers[first : first + len(entries(plan))], "tokens": tokens[name]}
            for name, plan, first in zip(self._names, self._plans, firsts, strict=True)
        }

    def of_request(self, reply: str) -> list[dict[str, Any]]:
        """Of each sample of a reply: its plan, and what was hit. Empty for a reply that is not known."""
        samples = []
        for live in self._of_reply.get(reply, ()):
            place = sample_of(live.request, reply)
            if place is not None:
                first = first_columns(self._plans)[live.row - 1]
                found = self._hits(live)[first : first + len(entries(self._plans[live.row - 1]))].tolist()
                plan = {"plan": live.asked.name, "dose": live.asked.dose, "tokens": live.tokens, "hits": found}
                samples.append({"prompt": place[0], "sample": place[1], **plan})
        return sorted(samples, key=lambda one: (one["prompt"], one["sample"]))


def replies_of(request: str) -> list[str]:
    """The ids that the reply may have to which a request of the engine belongs.

    >>> replies_of("1_cmpl-a0-2-01234567"), replies_of("chatcmpl-a0-01234567")
    (['cmpl-a0-2', 'cmpl-a0'], ['chatcmpl-a0'])
    """
    sample, found, rest = request.partition("_")
    stem = (rest if found and sample.isdecimal() else request).rpartition("-")[0]
    shorter, _, number = stem.rpartition("-")
    return [stem, shorter] if shorter and number.isdecimal() else [stem]


def sample_of(request: str, reply: str) -> tuple[int, int] | None:
    """(prompt, sample) that a request of the engine is of a reply; None for another reply's.

    The engine writes the sample before the reply's id, and behind it the prompt's number and eight random characters.

    >>> sample_of("1_cmpl-a0-2-01234567", "cmpl-a0"), sample_of("cmpl-a0b-0-01234567", "cmpl-a0")
    ((2, 1), None)
    """
    head, found, tail = request.partition(reply)
    sample = head[:-1] if head.endswith("_") else head
    if not found or (head and not (head.endswith("_") and sample.isdecimal())) or (tail and tail[0] != "-"):
        return None
    parts = tail[1:].split("-") if tail else []
    prompt = int(parts[0]) if len(parts) > 1 and parts[0].isdecimal() else 0
    return prompt, int(sample or 0)
