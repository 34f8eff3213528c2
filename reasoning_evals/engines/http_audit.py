"""Retries and other events of an HTTP endpoint as audit rows of a run: stored chunk by chunk, added up over sessions."""

from __future__ import annotations

from typing import Any

from reasoning_evals.engines.http_sampler import HttpSampler


class HttpAudit:
    """The context of an arm that samples over HTTP: ``Arm(name, sampler, context=lambda: HttpAudit(sampler))``.

    Counts the events of one chunk. A chunk that was interrupted by a kill and sampled again counts once, with its last attempt.
    """

    def __init__(self, sampler: HttpSampler) -> None:
        self._sampler = sampler
        self._before = sampler.stats

    def __enter__(self) -> HttpAudit:
        self._before = self._sampler.stats
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to clean up."""

    def to_rows(self) -> list[dict[str, Any]]:
        """One row with the counts, and one for each cause of retries."""
        now, before = self._sampler.stats, self._before
        causes = {name: number - before.reasons.get(name, 0) for name, number in now.reasons.items()}
        return [
            {
                "kind": "endpoint",
                "samples": now.num_samples - before.num_samples,
                "retried_samples": now.num_retried_samples - before.num_retried_samples,
                "retokenized": now.num_retokenized - before.num_retokenized,
            },
            *({"kind": "retry", "cause": name, "retries": number} for name, number in causes.items() if number),
        ]


def http_line(rows: list[dict[str, Any]]) -> str:
    """The rows of one arm in words."""
    (counts,) = (row for row in rows if row["kind"] == "endpoint")
    causes = {row["cause"]: row["retries"] for row in rows if row["kind"] == "retry"}
    said = f"endpoint: {counts['samples']} samples, {sum(causes.values())} retries"
    if causes:
        said += f" of {counts['retried_samples']} samples ({', '.join(f'{name}: {n}' for name, n in sorted(causes.items()))})"
    if counts["retokenized"]:
        said += f", {counts['retokenized']} without token ids, which were made from the text"
    return said
