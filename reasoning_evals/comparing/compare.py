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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from reasoning_evals.comparing.comparison import (
    ArmSummary,
    Comparison,
    Difference,
    DomainAccuracy,
    Flip,
    Measure,
    PairSummary,
)
from reasoning_evals.comparing.power import variance_parts
from reasoning_evals.comparing.statistics import (
    PairedDifference,
    holm,
    majority_correct,
    mcnemar_p,
    mean_estimate,
    paired_difference,
    pass_at_k,
    proportion_estimate,
)
from reasoning_evals.comparing.verdicts import Tuning, notes_on, verdict_on
from reasoning_evals.runs import GradeRow

__all__ = ["Comparison", "Tuning", "compare_arms"]


class _Table(NamedTuple):
    """The rows of one arm by problem, samples in order; problems in the order of the first arm."""

    name: str
    rows: dict[str, list[GradeRow]]

    def per_problem(self, field: str) -> list[float] | None:
        """Mean over the samples of each problem; None when a value was not measured."""
        values = [[getattr(row, field) for row in rows] for rows in self.rows.values()]
        if any(value is None for samples in values for value in samples):
            return None
        return [sum(samples) / len(samples) for samples in values]

    def share(self, *outcomes: str) -> float:
        """Share of all samples with one of these outcomes."""
        rows = [row for samples in self.rows.values() for row in samples]
        return sum(row.outcome in outcomes for row in rows) / len(rows)


def compare_arms(
    rows: Sequence[GradeRow],
    baseline: str = "baseline",
    pairs: Sequence[tuple[str, str]] | None = None,
    tuned: Tuning | None = None,
    unit: str = "points of accuracy",
) -> Comparison:
    """Compare every arm with the baseline, and with the placebo arms (those whose names start with "placebo").

    ``pairs`` names the comparisons (a, b) instead: b - a. ``tuned``: how the plan was chosen, for the note on multiplicity.
    ``unit``: unit of a difference in sentences. Each problem counts once for any k; problems with the same cluster_id are
    not treated as independent. ValueError for an unknown arm, when arms have different problems or sample numbers, or with
    fewer than two problems.
    """
    tables = _tables(rows)
    if baseline not in tables:
        raise ValueError(f"no arm is named {baseline!r}: the arms are {sorted(tables)}; name the baseline")
    wanted = _default_pairs(list(tables), baseline) if pairs is None else list(pairs)
    if unknown := sorted({name for pair in wanted for name in pair} - set(tables)):
        raise ValueError(f"no arm is named {unknown[0]!r}: the arms are {sorted(tables)}")
    first = next(iter(tables.values()))
    clusters = _clusters(first)
    k = len(next(iter(first.rows.values())))
    compared = [_compare_pair(tables[a], tables[b], k, clusters, unit) for a, b in wanted]
    adjusted = holm([pair.accuracy.p_value for pair in compared])
    return Comparison(
        task=rows[0].task,
        baseline=baseline,
        num_problems=len(first.rows),
        num_samples=k,
        num_clusters=None if clusters is None else len(set(clusters)),
        arms=tuple(_summarise(table, k, clusters) for table in tables.values()),
        pairs=tuple(pair.replace(holm_p=p) for pair, p in zip(compared, adjusted, strict=True)),
        notes=notes_on(len(compared), clusters is not None, tuned),
    )


def _tables(rows: Sequence[GradeRow]) -> dict[str, _Table]:
    if not rows:
        raise ValueError("nothing to compare: no graded samples are given")
    if len(tasks := {row.task for row in rows}) > 1:
        raise ValueError(f"the samples are of {len(tasks)} tasks ({sorted(tasks)}): compare each task on its own")
    samples: dict[str, dict[str, dict[int, GradeRow]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.sample_idx in samples[row.arm][row.problem_id]:
            raise ValueError(f"sample {row.sample_idx} of problem {row.problem_id!r}, arm {row.arm!r}, is there twice")
        samples[row.arm][row.problem_id][row.sample_idx] = row
    first_name, first = next(iter(samples.items()))
    for name, problems in samples.items():
        if problems.keys() != first.keys():
            only = sorted(problems.keys() ^ first.keys())
            raise ValueError(
                f"arms {first_name!r} and {name!r} have different problems ({len(only)} are in one only, such as "
                f"{only[0]!r}): sample the same problems in both"
            )
        for problem in first:
            if problems[problem].keys() != next(iter(first.values())).keys():
                raise ValueError(
                    f"arm {name!r} has {len(problems[problem])} samples of problem {problem!r}, arm {first_name!r} has "
                    f"{len(next(iter(first.values())))} a problem: sample the same number everywhere"
                )
    return {
        name: _Table(name, {problem: [problems[problem][j] for j in sorted(problems[problem])] for problem in first})
        for name, problems in samples.items()
    }


def _default_pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    placebos = [name for name in names if name.startswith("placebo") and name != baseline]
    treated = [name for name in names if name != baseline and name not in placebos]
    return [(baseline, name) for name in [*treated, *placebos]] + [(p, name) for name in treated for p in placebos]


def _clusters(table: _Table) -> list[str] | None:
    """A cluster id per problem, or None when no two problems share one."""
    ids = [samples[0].cluster_id for samples in table.rows.values()]
    named = [
        f"cluster {one}" if one is not None else f"problem {name}" for one, name in zip(ids, table.rows, strict=True)
    ]
    return named if len(set(named)) < len(named) else None


def _summarise(table: _Table, k: int, clusters: Sequence[str] | None) -> ArmSummary:
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
        grader_failed=table.share("grader_timeout", "grader_error"),
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
    return None if values is None else Measure.of(mean_estimate(values, clusters))


def _compare_pair(a: _Table, b: _Table, k: int, clusters: Sequence[str] | None, unit: str) -> PairSummary:
    rates_a, rates_b = a.per_problem("correct"), b.per_problem("correct")
    assert rates_a is not None
    assert rates_b is not None
    found = paired_difference(rates_a, rates_b, clusters, denominator=k, limit=1.0)
    gained = sum(after > before for before, after in zip(rates_a, rates_b, strict=True))
    lost = sum(after < before for before, after in zip(rates_a, rates_b, strict=True))
    exact = mcnemar_p(gained, lost) if k == 1 and clusters is None else None
    accuracy = Difference.of(found)
    parts = None
    if k > 1:
        tables = ([[row.correct for row in samples] for samples in table.rows.values()] for table in (a, b))
        parts = variance_parts(*tables)
    flips = [
        Flip.of(problem, a.rows[problem], b.rows[problem])
        for problem, before, after in zip(a.rows, rates_a, rates_b, strict=True)
        if before != after
    ]
    both = [name for name in a.rows if any(r.correct for r in a.rows[name]) and any(r.correct for r in b.rows[name])]
    verdict, sentence = verdict_on(a.name, b.name, accuracy, len(rates_a), k, exact, gained + lost, unit)
    return PairSummary(
        a=a.name,
        b=b.name,
        accuracy=accuracy,
        thinking_tokens=_token_difference(a, b, "thinking_tokens", clusters),
        total_tokens=_token_difference(a, b, "total_tokens", clusters),
        tokens_both_solved=_solved_tokens(a, b, both),
        num_both_solved=len(both),
        wins=gained,
        losses=lost,
        ties=len(rates_a) - gained - lost,
        mcnemar_p=exact,
        holm_p=None,
        effect_variance=parts.effect_variance if parts else None,
        sampling_noise=parts.noise_a + parts.noise_b if parts else None,
        gained=tuple(
            sorted((f for f in flips if f.rate_b > f.rate_a), key=lambda f: (f.rate_a - f.rate_b, f.problem_id))
        ),
        lost=tuple(
            sorted((f for f in flips if f.rate_b < f.rate_a), key=lambda f: (f.rate_b - f.rate_a, f.problem_id))
        ),
        verdict=verdict,
        sentence=sentence,
    )


def _token_difference(a: _Table, b: _Table, field: str, clusters: Sequence[str] | None) -> Difference | None:
    before, after = a.per_problem(field), b.per_problem(field)
    if before is None or after is None:
        return None
    return Difference.of(paired_difference(before, after, clusters))


def _solved_tokens(a: _Table, b: _Table, both: Sequence[str]) -> Difference | None:
    """Tokens of the correct samples, on problems that both arms solved at least once: without survivor bias (an arm that
    only solves easy problems would look short)."""
    if len(both) < 2:
        return None

    def means(rows: Mapping[str, list[GradeRow]]) -> list[float]:
        tokens = [[row.total_tokens for row in rows[name] if row.correct] for name in both]
        return [sum(values) / len(values) for values in tokens]

    found: PairedDifference = paired_difference(means(a.rows), means(b.rows))
    return Difference.of(found)
