"""Graded samples of several arms, compared problem by problem.

Why paired: problems differ in difficulty far more than arms do. Both arms get the same problems, so the difference is taken per
problem and the difficulty cancels; the interval comes from the spread of these differences. Why per problem: k samples of one
problem are not k independent observations, so each problem contributes one number however large k is. Worked example with
4 problems and k = 2 (share of correct samples):

    problem      1    2    3    4      mean
    baseline    0.0  0.5  1.0  1.0    0.625
    steered     0.5  0.5  1.0  1.0    0.75
    b - a       0.5  0.0  0.0  0.0    0.125, standard error 0.125 (over n = 4 problems, not 8 samples): no effect shown

Two independent samples of problems with these means would have a standard error of 0.28 instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from reasoning_evals.comparing.comparison import ArmSummary, Comparison, Difference, DomainAccuracy, Measure
from reasoning_evals.comparing.pairing import Paired, judged, mean_length
from reasoning_evals.comparing.statistics import majority_correct, paired_difference, pass_at_k, proportion_estimate
from reasoning_evals.comparing.tables import Table, clusters_of, default_pairs, tables_of
from reasoning_evals.comparing.verdicts import ALPHA, Family, Tuning, notes_on
from reasoning_evals.runs import GradeRow

__all__ = ["Comparison", "Tuning", "compare_arms"]


def compare_arms(
    rows: Sequence[GradeRow],
    baseline: str = "baseline",
    pairs: Sequence[tuple[str, str]] | None = None,
    tuned: Tuning | None = None,
    unit: str = "points of accuracy",
) -> Comparison:
    """Compare every arm with the baseline, and with the placebo arms (those whose names start with "placebo").

    ``pairs`` names the comparisons (a, b) instead: b - a. ``tuned``: how the plan was chosen, for the note on multiplicity.
    ``unit``: unit of a difference in sentences. Verdicts, on accuracy and on length, follow Holm's procedure over all pairs. Each problem
    counts once for any k; problems with the same cluster_id are not treated as independent. ValueError for an unknown arm, when arms have different problems or sample numbers, or with
    fewer than two problems.
    """
    tables = tables_of(rows)
    if baseline not in tables:
        raise ValueError(f"no arm is named {baseline!r}: the arms are {sorted(tables)}; name the baseline")
    wanted = default_pairs(list(tables), baseline) if pairs is None else list(pairs)
    if unknown := sorted({name for pair in wanted for name in pair} - set(tables)):
        raise ValueError(f"no arm is named {unknown[0]!r}: the arms are {sorted(tables)}")
    first = next(iter(tables.values()))
    clusters = clusters_of(first)
    k = len(next(iter(first.rows.values())))
    family = Family.of(wanted, clusters is not None)
    compared = [Paired.of(tables[a], tables[b], k, clusters, ALPHA / max(1, len(wanted))) for a, b in wanted]
    return Comparison(
        task=rows[0].task,
        baseline=baseline,
        num_problems=len(first.rows),
        num_samples=k,
        num_clusters=None if clusters is None else len(set(clusters)),
        arms=tuple(_summarise(table, k, clusters) for table in tables.values()),
        pairs=judged(compared, family, unit),
        notes=notes_on(family, clusters is not None, tuned),
    )


def differences(
    rows: Sequence[GradeRow],
    baseline: str,
    level: float,
    value: Callable[[GradeRow], float] = lambda row: row.correct,
    parts: int = 1,
) -> dict[str, Difference]:
    """Arm -> its difference from the baseline in the mean ``value`` of a sample, a whole number of ``parts`` of 1. Accuracy alone, for a
    caller that judges these with others: ``level`` is that of one of its verdicts. ValueError as ``compare_arms``."""
    tables = tables_of(rows)
    if baseline not in tables:
        raise ValueError(f"no arm is named {baseline!r}")
    clusters, before = clusters_of(tables[baseline]), tables[baseline].means(value)
    k = len(next(iter(tables[baseline].rows.values())))
    return {
        name: Difference.of(
            paired_difference(before, table.means(value), clusters, denominator=parts * k, limit=1.0, level=level)
        )
        for name, table in tables.items()
        if name != baseline
    }


def _summarise(table: Table, k: int, clusters: Sequence[str] | None) -> ArmSummary:
    correct = table.per_problem("correct")
    assert correct is not None
    domains: dict[str, list[int]] = defaultdict(list)
    for index, samples in enumerate(table.rows.values()):
        domains[samples[0].domain or "all"].append(index)
    solved = [sum(row.correct for row in samples) for samples in table.rows.values()]
    votes = [majority_correct([r.extracted for r in s], [r.correct for r in s]) for s in table.rows.values()]
    return ArmSummary(
        name=table.name,
        accuracy=Measure.of(proportion_estimate(correct, clusters)),
        pass_at_k=sum(pass_at_k(k, count, k) for count in solved) / len(solved),
        majority_at_k=sum(votes) / len(votes),
        thinking_tokens=_tokens(table.per_problem("thinking_tokens"), clusters),
        answer_tokens=_tokens(table.per_problem("answer_tokens"), clusters),
        total_tokens=_tokens(table.per_problem("total_tokens"), clusters),
        wrong=table.share("wrong"),
        no_answer=table.share("no_answer", "cut"),
        truncated=table.share("truncated", "unclosed"),
        grader_failed=table.share("grader_error"),
        domains={
            name: _domain([correct[i] for i in of], clusters and [clusters[i] for i in of])
            for name, of in sorted(domains.items())
        },
    )


def _domain(values: list[float], clusters: Sequence[str] | None) -> DomainAccuracy:
    if clusters is None:
        return DomainAccuracy.of(values)
    if len(set(clusters)) < 2:
        return DomainAccuracy(len(values), sum(values) / len(values), None, None)
    estimate = proportion_estimate(values, clusters)
    return DomainAccuracy(len(values), estimate.mean, estimate.low, estimate.high)


def _tokens(values: list[float] | None, clusters: Sequence[str] | None) -> Measure | None:
    return None if values is None else mean_length(values, clusters)
