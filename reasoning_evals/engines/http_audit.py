"""Retries and other events of an HTTP endpoint as audit rows of a run: stored chunk by chunk, added up over sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Protocol


class Tally:
    """Counts what happens to requests; only the event loop's thread adds to it. Failures need not be random (a long completion has more
    time to fail), so retries can bias what is sampled."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        """Retries by cause: an HTTP status, "connection", or "cut stream"."""
        self.counts: Counter[str] = Counter()
        """samples; retried, those of them that were asked for again; retokenized, whose ids the server did not send, so that the text was
        tokenized here; counted, whose tokens the server counted; filtered, that a content filter ended; unaudited, of which the server no
        longer knew what the plan did; unseeded, whose seed it refused to take."""
        self.hits: Counter[int] = Counter()
        """Tokens at which each entry of the plan acted."""


AUDITED: ContextVar[Tally | None] = ContextVar("audited", default=None)
"""Where what this thread asks for is counted: chunks of one arm may be under way at the same time."""


class Planned(Protocol):
    """A sampler under a plan."""

    @property
    def plan_entries(self) -> Sequence[Mapping[str, Any]]:
        """The entries that ``hits`` counts for."""


class HttpAudit:
    """The context of an arm that samples over HTTP: ``Arm(name, sampler, context=lambda: HttpAudit(sampler))``.

    Counts what the thread that entered it asks for: the events of one chunk. A chunk that was interrupted by a kill and sampled
    again counts once, with its last attempt.
    """

    def __init__(self, sampler: Planned) -> None:
        self._entries = sampler.plan_entries
        self.tally = Tally()
        self._token: Token[Tally | None] | None = None

    def __enter__(self) -> HttpAudit:
        self._token = AUDITED.set(self.tally)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        AUDITED.reset(self._token)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row with the counts, one for each cause of retries, and one for each entry of the plan, as ``steer``'s audit has
        them; the weight that a gain added is not known."""
        counts = self.tally.counts
        return [
            {
                "kind": "endpoint",
                "samples": counts["samples"],
                "retried_samples": counts["retried"],
                "retokenized": counts["retokenized"],
                **{name: counts[name] for name in ("counted", "filtered", "unaudited", "unseeded") if counts[name]},
            },
            *(
                {"kind": "retry", "cause": name, "retries": number}
                for name, number in sorted(self.tally.reasons.items())
            ),
            *({**entry, "tokens": self.tally.hits[index]} for index, entry in enumerate(self._entries)),
        ]


def http_line(rows: list[dict[str, Any]]) -> str:
    """The rows of one arm in words."""
    if not rows:
        return "endpoint: what it did is not known, the run has lost its audit (audit.jsonl)"
    (counts,) = (row for row in rows if row["kind"] == "endpoint")
    causes = {row["cause"]: row["retries"] for row in rows if row["kind"] == "retry"}
    said = f"endpoint: {counts['samples']} samples, {sum(causes.values())} retries"
    if causes:
        said += f" of {counts['retried_samples']} samples ({', '.join(f'{name}: {n}' for name, n in sorted(causes.items()))})"
    if counts.get("filtered"):
        said += f", {counts['filtered']} ended by a content filter"
    if counts.get("counted"):
        said += f", {counts['counted']} without token ids, which the server counted"
    if counts.get("unseeded"):
        said += f", {counts['unseeded']} without their seed, which the server refuses: sampled again they come out otherwise"
    if counts.get("unaudited"):
        said += f", {counts['unaudited']} of which the server no longer knew what the plan did"
    if counts["retokenized"]:
        said += f", {counts['retokenized']} without token ids, which were made from the text"
    return said
