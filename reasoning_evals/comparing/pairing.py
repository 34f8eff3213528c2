"""Two arms on the same problems: what is measured of them, and, once all pairs are measured, what is said about them.

Two steps, because the words depend on all pairs: with many arms, one of them looks better by chance.

Lengths are judged as a ratio of mean tokens on its logarithm, over clusters: they are skewed, and a symmetric interval of their difference or
ratio covers too seldom. The standard error is a jackknife's and not the linearised variance: a few long problems carry the means, and leaving
each out shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from reasoning_evals.comparing.comparison import Difference, Flip, Length, PairSummary
from reasoning_evals.comparing.power import variance_parts
from reasoning_evals.comparing.resampling import CONFIDENCE, sign_flip_p
from reasoning_evals.comparing.statistics import holm, mcnemar_p, paired_difference
from reasoning_evals.comparing.tables import Table
from reasoning_evals.comparing.verdicts import ALPHA, Cut, Family, length_verdict, verdict_on, verdict_p
from reasoning_evals.runs import GradeRow

ESTIMAND = "ratio of mean tokens over the same problems"


class LogRatio(NamedTuple):
    """mean(b) / mean(a) with its 95% interval and the p of "no change"."""

    value: float
    low: float | None
    """None, as the upper end, where tokens are left in fewer than two units of an arm, so that no logarithm says how sure this is."""
    high: float | None
    p_value: float


def paired_log_ratio(
    a_P: Sequence[float], b_P: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> LogRatio:
    """mean(b) / mean(a) over the same problems in the same order, and exp(log ratio +- t se).

    se: jackknife over problems, or over ``clusters``, (G-1)/G sum_g (log ratio without g - log ratio)^2. t has G' - 1 degrees of
    freedom, G' = 1 / sum_g w_g^2 with w_g the share of unit g in all tokens (Kish's effective number): 30 problems of which three
    hold most tokens say as much as three. p: of that t, or of the sign-flip test where there is no logarithm or all changed alike.
    ValueError with fewer than two problems or clusters, unequal numbers of problems, or a mean of a that is not positive.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a ratio needs the same two or more problems in both arms, got {len(a)} and {len(b)}")
    if a.mean() <= 0:
        raise ValueError(f"the first arm has {a.mean():g} tokens a problem: there is nothing to divide by")
    numbers: dict[Hashable, int] = {}
    index_P = [numbers.setdefault(name, len(numbers)) for name in (range(len(a)) if clusters is None else clusters)]
    a_G, b_G = np.bincount(index_P, weights=a), np.bincount(index_P, weights=b)
    num = len(a_G)
    if num < 2:
        raise ValueError(f"a ratio needs at least 2 clusters, got {num}: add problems")
    ratio = float(b.sum() / a.sum())
    rest_a_G, rest_b_G = a_G.sum() - a_G, b_G.sum() - b_G
    if min(rest_a_G.min(), rest_b_G.min()) < 1e-9 * a.sum():
        return LogRatio(ratio, None, None, sign_flip_p(b_G - a_G))
    away_G = np.log(rest_b_G / rest_a_G) - math.log(ratio)
    se = math.sqrt((num - 1) / num * float((away_G**2).sum()))
    if se < 1e-12:
        return LogRatio(ratio, ratio, ratio, sign_flip_p(b_G - a_G))
    share_G = (a_G / a_G.sum() + b_G / b_G.sum()) / 2
    df = max(1.0, 1 / float((share_G**2).sum()) - 1)
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, df)) * se
    p_value = float(2 * scipy.stats.t.sf(abs(math.log(ratio)) / se, df))
    return LogRatio(ratio, ratio * math.exp(-half), ratio * math.exp(half), p_value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Arm b against arm a, measured; nothing is judged yet."""

    a: Table
    b: Table
    k: int
    rates_a: list[float]
    rates_b: list[float]
    clusters: Sequence[str] | None
    accuracy: Difference
    mcnemar_p: float | None
    length: LogRatio | None
    of_thoughts: bool
    cut: Cut

    @classmethod
    def of(cls, a: Table, b: Table, k: int, clusters: Sequence[str] | None, family: Family) -> Paired:
        """Both tables have the same problems. ``family``: all pairs that are judged together."""
        rates_a, rates_b = (table.means(lambda row: row.correct) for table in (a, b))
        found = paired_difference(
            rates_a, rates_b, clusters, denominator=k, limit=1.0, level=ALPHA / max(1, family.num_pairs)
        )
        gained = sum(after > before for before, after in zip(rates_a, rates_b, strict=True))
        lost = sum(after < before for before, after in zip(rates_a, rates_b, strict=True))
        tokens_a, tokens_b = a.per_problem("thinking_tokens"), b.per_problem("thinking_tokens")
        of_thoughts = tokens_a is not None and tokens_b is not None
        if tokens_a is None or tokens_b is None:
            tokens_a, tokens_b = (table.means(lambda row: row.total_tokens) for table in (a, b))
        return cls(
            a=a,
            b=b,
            k=k,
            rates_a=rates_a,
            rates_b=rates_b,
            clusters=clusters,
            accuracy=Difference.of(found),
            mcnemar_p=mcnemar_p(gained, lost) if k == 1 and clusters is None else None,
            length=paired_log_ratio(tokens_a, tokens_b, clusters) if sum(tokens_a) > 0 else None,
            of_thoughts=of_thoughts,
            cut=Cut.of(a.means(was_cut), b.means(was_cut), clusters, k),
        )

    @property
    def p_value(self) -> float:
        """The verdict's own."""
        return verdict_p(self.accuracy, self.mcnemar_p)

    def summary(self, holm_p: float, length: Length | None, family: Family, unit: str) -> PairSummary:
        """With the verdict that follows from ``holm_p``."""
        a, b = self.a, self.b
        verdict, sentence = verdict_on(
            a.name, b.name, self.accuracy, len(self.rates_a), self.k, self.mcnemar_p, holm_p, family, self.cut, unit
        )
        parts = None
        if self.k > 1:
            parts = variance_parts(*([[row.correct for row in s] for s in table.rows.values()] for table in (a, b)))
        flips = [
            Flip.of(problem, a.rows[problem], b.rows[problem])
            for problem, before, after in zip(a.rows, self.rates_a, self.rates_b, strict=True)
            if before != after
        ]
        gained, lost = ([f for f in flips if (f.rate_b > f.rate_a) == up] for up in (True, False))
        both = [
            name for name in a.rows if any(r.correct for r in a.rows[name]) and any(r.correct for r in b.rows[name])
        ]
        return PairSummary(
            a=a.name,
            b=b.name,
            accuracy=self.accuracy,
            thinking_tokens=_token_difference(a, b, "thinking_tokens", self.clusters),
            total_tokens=_token_difference(a, b, "total_tokens", self.clusters),
            tokens_both_solved=_solved_tokens(a, b, both),
            num_both_solved=len(both),
            length=length,
            cut_a=self.cut.a,
            cut_b=self.cut.b,
            wins=len(gained),
            losses=len(lost),
            ties=len(self.rates_a) - len(flips),
            mcnemar_p=self.mcnemar_p,
            p_value=self.p_value,
            holm_p=holm_p,
            effect_variance=parts.effect_variance if parts else None,
            sampling_noise=parts.noise if parts else None,
            gained=tuple(sorted(gained, key=lambda f: (f.rate_a - f.rate_b, f.problem_id))),
            lost=tuple(sorted(lost, key=lambda f: (f.rate_b - f.rate_a, f.problem_id))),
            verdict=verdict,
            sentence=sentence,
        )


def judged(pairs: Sequence[Paired], family: Family, unit: str) -> tuple[PairSummary, ...]:
    """All pairs of a comparison with their verdicts: Holm over the verdicts' own p-values, lengths in a family of their own."""
    adjusted = holm([pair.p_value for pair in pairs])
    measured = [pair for pair in pairs if pair.length is not None]
    lengths = dict(zip(map(id, measured), holm([p.length.p_value for p in measured if p.length]), strict=True))
    return tuple(
        pair.summary(p, _length(pair, lengths.get(id(pair))), family, unit)
        for pair, p in zip(pairs, adjusted, strict=True)
    )


def was_cut(row: GradeRow) -> bool:
    """Whether the token limit ended the response: its length is a lower bound."""
    return row.finish_reason == "length" or row.outcome in ("truncated", "cut")


def _length(pair: Paired, holm_p: float | None) -> Length | None:
    found = pair.length
    if found is None or holm_p is None:
        return None
    verdict = length_verdict(found.value, holm_p)
    return Length(found.value, found.low, found.high, found.p_value, holm_p, pair.of_thoughts, verdict)


def _token_difference(a: Table, b: Table, field: str, clusters: Sequence[str] | None) -> Difference | None:
    before, after = a.per_problem(field), b.per_problem(field)
    if before is None or after is None:
        return None
    return Difference.of(paired_difference(before, after, clusters))


def _solved_tokens(a: Table, b: Table, both: Sequence[str]) -> Difference | None:
    """Tokens of the correct samples, on problems that both arms solved at least once: without survivor bias (an arm that
    only solves easy problems would look short)."""
    if len(both) < 2:
        return None

    def means(rows: Mapping[str, list[GradeRow]]) -> list[float]:
        tokens = [[row.total_tokens for row in rows[name] if row.correct] for name in both]
        return [sum(values) / len(values) for values in tokens]

    return Difference.of(paired_difference(means(a.rows), means(b.rows)))
