"""The result of a comparison of arms as plain records, to and from JSON. Equal data give equal bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasoning_evals.comparing.statistics import Estimate, PairedDifference, proportion_estimate
from reasoning_evals.runs import GradeRow

_DIGITS = 6  # significant digits: far finer than any standard error, coarser than the rounding of sums


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean over problems with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: Estimate) -> Measure:
        """Without the degrees of freedom."""
        return cls(estimate.mean, estimate.low, estimate.high)


@dataclass(frozen=True, slots=True)
class DomainAccuracy:
    """Accuracy on the problems of one domain; no interval for a single problem."""

    num_problems: int
    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> DomainAccuracy:
        """From per-problem accuracies."""
        if len(values) < 2:
            return cls(len(values), values[0], None, None)
        estimate = proportion_estimate(values)
        return cls(len(values), estimate.mean, estimate.low, estimate.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmSummary:
    """One arm by itself. Shares are of all samples."""

    name: str
    accuracy: Measure
    pass_at_k: float
    """Unbiased, for k = the number of samples a problem."""
    majority_at_k: float
    thinking_tokens: Measure | None
    answer_tokens: Measure | None
    total_tokens: Measure | None
    wrong: float
    no_answer: float
    """Responses without an answer, after a thought or without one; cut by the token limit or not."""
    truncated: float
    """Responses that are inside a thought to their end; cut by the token limit or not."""
    grader_failed: float
    domains: Mapping[str, DomainAccuracy]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over problems of b - a: see ``PairedDifference``."""

    mean: float
    low: float
    high: float
    se: float
    p_value: float
    bootstrap_low: float
    bootstrap_high: float
    sign_flip_p: float
    num_changed: int
    loss_bound: float
    detectable: float | None
    power: float | None
    exaggeration: float | None

    @classmethod
    def of(cls, found: PairedDifference) -> Difference:
        """The fields that are reported."""
        return cls(**{field.name: getattr(found, field.name) for field in dataclasses.fields(cls)})


@dataclass(frozen=True, slots=True)
class Length:
    """Mean tokens of arm b / of arm a over the same problems; see ``paired_log_ratio``."""

    ratio: float
    low: float | None
    high: float | None
    p_value: float
    holm_p: float
    """Adjusted for the number of pairs whose lengths are compared."""
    of_thoughts: bool
    """Of the thoughts; of all generated tokens where those of the thoughts were not measured."""
    verdict: str
    """fewer tokens, more tokens, or no change in length shown: by ``holm_p``."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that one arm solved more often, with one sample of each arm as an example."""

    problem_id: str
    rate_a: float
    rate_b: float
    sample_a: int
    sample_b: int

    @classmethod
    def of(cls, problem_id: str, a: Sequence[GradeRow], b: Sequence[GradeRow]) -> Flip:
        """Choose two samples that differ: with the same number (and seed) if possible, else the first correct and the first
        wrong."""
        rate_a, rate_b = (sum(row.correct for row in rows) / len(rows) for rows in (a, b))
        better = rate_b > rate_a
        same = [x.sample_idx for x, y in zip(a, b, strict=True) if x.correct != better and y.correct == better]
        if same:
            return cls(problem_id, rate_a, rate_b, same[0], same[0])
        first_a = next(row.sample_idx for row in a if row.correct != better)
        first_b = next(row.sample_idx for row in b if row.correct == better)
        return cls(problem_id, rate_a, rate_b, first_a, first_b)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSummary:
    """Arm b against arm a, paired by problem."""

    a: str
    b: str
    accuracy: Difference
    thinking_tokens: Difference | None
    total_tokens: Difference | None
    tokens_both_solved: Difference | None
    """Total tokens of correct samples, on problems that both arms solved."""
    num_both_solved: int
    length: Length | None
    """None where the first arm has no tokens."""
    cut_a: float
    """Share of arm a's samples that the token limit cut: their lengths are lower bounds."""
    cut_b: float
    wins: int
    """Problems that b solved more often."""
    losses: int
    ties: int
    mcnemar_p: float | None
    """Exact McNemar test, for one sample a problem."""
    p_value: float
    """The verdict's own: McNemar's, or the larger of the t and the sign-flip test's."""
    holm_p: float
    """p_value adjusted for the number of pairs: the verdict in words follows it."""
    effect_variance: float | None
    """w^2 of ``power.py``; None for one sample a problem."""
    sampling_noise: float | None
    """E p(1-p) of both arms together."""
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    verdict: str
    """helped, hurt, or no effect shown."""
    sentence: str

    def replace(self, **changes: Any) -> PairSummary:
        """A changed copy."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All arms of a run and the pairs that were compared."""

    task: str
    baseline: str
    num_problems: int
    num_samples: int
    """k: samples a problem in every arm."""
    num_clusters: int | None
    arms: tuple[ArmSummary, ...]
    pairs: tuple[PairSummary, ...]
    notes: tuple[str, ...]

    def arm(self, name: str) -> ArmSummary:
        """KeyError for an unknown arm."""
        return {arm.name: arm for arm in self.arms}[name]

    def pair(self, a: str, b: str) -> PairSummary:
        """KeyError when these were not compared."""
        return {(pair.a, pair.b): pair for pair in self.pairs}[a, b]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers rounded to 6 significant digits."""
        values: dict[str, Any] = rounded(dataclasses.asdict(self))
        return values

    def to_json(self) -> str:
        """With sorted keys; without time, path or machine."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The reverse of ``to_dict``; ValueError when the values are not a comparison."""
        try:
            arms = tuple(_arm(arm) for arm in values["arms"])
            pairs = tuple(_pair(pair) for pair in values["pairs"])
            own = {name: value for name, value in values.items() if name != "caps"}  # of ``moe-steer compare --caps``
            return cls(**{**own, "arms": arms, "pairs": pairs, "notes": tuple(values["notes"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a comparison ({error}): compare the graded run again") from error


def _arm(values: Mapping[str, Any]) -> ArmSummary:
    measures = {
        name: _maybe(Measure, values[name]) for name in ("accuracy", "thinking_tokens", "answer_tokens", "total_tokens")
    }
    domains = {name: DomainAccuracy(**domain) for name, domain in values["domains"].items()}
    return ArmSummary(**{**values, **measures, "domains": domains})


def _pair(values: Mapping[str, Any]) -> PairSummary:
    names = ("accuracy", "thinking_tokens", "total_tokens", "tokens_both_solved")
    differences = {name: _maybe(Difference, values[name]) for name in names}
    flips = {name: tuple(Flip(**flip) for flip in values[name]) for name in ("gained", "lost")}
    return PairSummary(**{**values, **differences, **flips, "length": _maybe(Length, values["length"])})


def _maybe(kind: Any, values: Mapping[str, Any] | None) -> Any:
    return None if values is None else kind(**values)


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits, inside any nesting: far below any standard error, above the rounding of sums. NaN becomes None."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.{_DIGITS}g}") + 0.0  # no -0.0
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value
