"""Retries and other events of an HTTP endpoint as audit rows of a run: stored chunk by chunk, added up over sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class HttpStats(NamedTuple):
    """Counts of requests so far. Failures need not be random (a long completion has more time to fail), so retries can bias
    what is sampled."""

    num_samples: int
    num_retried_samples: int
    reasons: dict[str, int]
    """Retries by cause: an HTTP status, "connection", or "cut stream"."""
    num_retokenized: int
    """Samples whose ids the server did not send, so that the text was tokenized again here."""
    num_counted: int = 0
    """Samples without ids whose tokens the server counted."""
    num_filtered: int = 0
    """Samples that a content filter of the server ended."""
    num_unaudited: int = 0
    """Steered samples of which the server no longer knew what the plan did."""
    hits: tuple[int, ...] = ()
    """Tokens at which each entry of the plan acted."""


class Counting(Protocol):
    """A sampler that counts what happens to its requests."""

    @property
    def stats(self) -> HttpStats:
        """Counts so far."""

    @property
    def plan_entries(self) -> Sequence[Mapping[str, Any]]:
        """The entries that ``hits`` counts for."""


class HttpAudit:
    """The context of an arm that samples over HTTP: ``Arm(name, sampler, context=lambda: HttpAudit(sampler))``.

    Counts the events of one chunk. A chunk that was interrupted by a kill and sampled again counts once, with its last attempt.
    """

    def __init__(self, sampler: Counting) -> None:
        self._sampler = sampler
        self._before = sampler.stats

    def __enter__(self) -> HttpAudit:
        self._before = self._sampler.stats
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to clean up."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row with the counts, one for each cause of retries, and one for each entry of the plan, as ``steer``'s audit has
        them; the weight that a gain added is not known."""
        now, before = self._sampler.stats, self._before
        rare = {"counted": now.num_counted - before.num_counted, "filtered": now.num_filtered - before.num_filtered}
        rare["unaudited"] = now.num_unaudited - before.num_unaudited
        fired = [number - earlier for number, earlier in zip(now.hits, before.hits, strict=True)]
        causes = {name: number - before.reasons.get(name, 0) for name, number in now.reasons.items()}
        return [
            {
                "kind": "endpoint",
                "samples": now.num_samples - before.num_samples,
                "retried_samples": now.num_retried_samples - before.num_retried_samples,
                "retokenized": now.num_retokenized - before.num_retokenized,
                **{name: number for name, number in rare.items() if number},
            },
            *({"kind": "retry", "cause": name, "retries": number} for name, number in causes.items() if number),
            *({**entry, "tokens": number} for entry, number in zip(self._sampler.plan_entries, fired, strict=True)),
        ]


def http_line(rows: list[dict[str, Any]]) -> str:
    """The rows of one arm in words."""
    (counts,) = (row for row in rows if row["kind"] == "endpoint")
    causes = {row["cause"]: row["retries"] for row in rows if row["kind"] == "retry"}
    said = f"endpoint: {counts['samples']} samples, {sum(causes.values())} retries"
    if causes:
        said += f" of {counts['retried_samples']} samples ({', '.join(f'{name}: {n}' for name, n in sorted(causes.items()))})"
    if counts.get("filtered"):
        said += f", {counts['filtered']} ended by a content filter"
    if counts.get("counted"):
        said += f", {counts['counted']} without token ids, which the server counted"
    if counts.get("unaudited"):
        said += f", {counts['unaudited']} of which the server no longer knew what the plan did"
    if counts["retokenized"]:
        said += f", {counts['retokenized']} without token ids, which were made from the text"
    return said
