"""The measures that ``score --by`` offers beside nPMI, each as sums of ratios over problems, and what each needs.

risk       p(E | marker) - p(E | other tokens), over the markers by coefficient (SteerMoE, arXiv 2509.09660)
mass       gate weight that a response token gives the expert
norm       what the expert adds to its layer's output, L2 norm, mean over the tokens that select it (REAP, arXiv 2510.13999, Eq. 9)
influence  KL divergence of the next token's distribution when the expert is left out, a response token (Ban&Pick, arXiv 2509.06346)
contrast   share of tokens that select the expert, in right answers minus wrong ones of the same problem
causes     d outcome / d log gain (`expert_stats.causes`), towards the side that is wanted

Evidence: risk keeps that of the markers. mass, norm and influence are positive of any expert; their q asks whether the expert lies
above the mean of its layer. contrast and causes have two sides; their q asks whether the score is 0. All by problem, Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from expert_stats.causes.causes_file import Causes, refuse_other_model
from expert_stats.counts import RoutingCounts
from expert_stats.evidence import ProblemSums, Ratio, RatioEstimate, Rival
from expert_stats.npmi import BY
from expert_stats.rivals.measuring import Measures

Array = np.ndarray[Any, Any]

MakeRival = Callable[[ProblemSums, Array], Rival]
"""(counts by problem, coefficients of the markers) -> the rival."""
_ABOVE = "than the mean expert of its layer"
_OF_MODEL = {
    "mass": ("weights", "gate weight a response token gives the expert", f"more gate weight {_ABOVE}"),
    "norm": (
        "outputs",
        "norm of what the expert adds where it is selected (REAP, arXiv 2510.13999)",
        f"a larger output {_ABOVE}",
    ),
    "influence": (
        "divergence",
        "KL divergence of the next token without the expert, nats a response token (Ban&Pick, arXiv 2509.06346)",
        f"more influence on the next token {_ABOVE}",
    ),
}
"""Method -> (what of `Measures` it reads, what the score is, what its q is evidence of)."""
METHODS = (*BY, "risk", *_OF_MODEL, "contrast", "causes")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What was given beside the counts."""

    measures: Measures | None = None
    right: Mapping[str, bool] | None = None
    """trace_id -> whether its answer is right."""
    causes: Causes | None = None


def lacking(by: str, sources: Sources) -> str:
    """What a method needs and was not given, with the command that provides it; "" where nothing is missing."""
    if by in _OF_MODEL:
        what = _OF_MODEL[by][0]
        if sources.measures is None or what not in sources.measures.sums:
            return (
                f"--by {by} reads {what} of experts, which counts do not hold: give --measures with a file of "
                f"'moe-steer measure --of {what}'"
            )
    if by == "contrast" and sources.right is None:
        return "--by contrast reads which answers are right: give --graded with the folder of a run, which 'moe-steer generate' makes"
    if by == "causes" and sources.causes is None:
        return "--by causes reads derivatives of an outcome: give --causes with a file of 'moe-steer causes'"
    return ""


def rival_of(by: str, counts: RoutingCounts, sources: Sources) -> MakeRival | None:
    """How the method's score is made; None for nPMI and RICE's own. ValueError in one line for what it lacks, and for files of
    another model."""
    if missing := lacking(by, sources):
        raise ValueError(missing)
    if by == "risk":
        return lambda sums, weights_M: _risk(sums, weights_M, counts.num_experts)
    if by in _OF_MODEL:
        assert sources.measures is not None
        rival = _of_model(by, counts, sources.measures)
    elif by == "contrast":
        assert sources.right is not None
        rival = _contrast(counts, sources.right)
    elif by == "causes":
        assert sources.causes is not None
        rival = _causes(counts, sources.causes)
    else:
        return None
    return lambda sums, weights_M: rival


def _risk(sums: ProblemSums, weights_M: Array, num_experts: int) -> Rival:
    terms = []
    for index in np.flatnonzero((weights_M != 0) & (sums.marker_PM.sum(0) > 0)).tolist():
        joint_PC, marker_P1 = sums.joint_PMC[:, index].astype(float), sums.marker_PM[:, index : index + 1].astype(float)
        weight = float(weights_M[index])
        terms.append(Ratio(weight, joint_PC, marker_P1))
        terms.append(Ratio(-weight, sums.expert_PC - joint_PC, sums.total_P[:, None] - marker_P1))
    return Rival(
        name="risk",
        words="share of the marker's tokens that select the expert minus that of other tokens (SteerMoE, arXiv 2509.09660)",
        claim="",
        estimate=RatioEstimate(
            problems=sums.problems,
            families=sums.families,
            terms=tuple(terms),
            selected_PC=sums.expert_PC > 0,
            num_experts=num_experts,
            signed=False,
        ),
    )


def _of_model(by: str, counts: RoutingCounts, measures: Measures) -> Rival:
    refuse_other_model("measures", measures.model, "counts", counts.signature.model)
    what, words, claim = _OF_MODEL[by]
    num = len(measures.problems)
    selected_PC = measures.selected_PLE.reshape(num, -1)
    below = selected_PC.astype(float) if by == "norm" else measures.tokens_P[:, None].astype(float)
    return Rival(
        name=by,
        words=words,
        claim=claim,
        estimate=RatioEstimate(
            problems=measures.problems,
            families=measures.families,
            terms=(Ratio(1.0, measures.sums[what].reshape(num, -1), below),),
            selected_PC=selected_PC > 0,
            num_experts=counts.num_experts,
            signed=False,
        ),
    )


def _contrast(counts: RoutingCounts, right: Mapping[str, bool]) -> Rival:
    """ValueError where no problem has both a right and a wrong answer among the traces counted."""
    cells = len(counts.moe_layers) * counts.num_experts
    sides: dict[tuple[str, str], dict[bool, list[Array]]] = {}
    for trace, expert_BLE, _ in counts.unpacked():
        if trace.trace_id in right and (total := int(trace.total_B.sum())):
            rate_C = expert_BLE.reshape(-1, cells).sum(0, dtype=np.int64) / total
            own = sides.setdefault((trace.problem, trace.family), {True: [], False: []})
            own[right[trace.trace_id]].append(rate_C)
    both = {key: own for key, own in sides.items() if own[True] and own[False]}
    if not both:
        raise ValueError(
            f"of {len(sides)} problems counted and graded none has both a right and a wrong answer: sample several answers a "
            "problem, and count the run that is graded"
        )
    means = [[np.mean(own[side], axis=0) for side in (True, False)] for own in both.values()]
    return Rival(
        name="contrast",
        words="share of tokens that select the expert, in right answers minus wrong ones of the same problem",
        claim="another rate in right answers than in wrong ones",
        estimate=RatioEstimate(
            problems=tuple(problem for problem, _ in both),
            families=tuple(family for _, family in both),
            terms=(Ratio(1.0, np.array([one - other for one, other in means]), np.ones((len(both), 1))),),
            selected_PC=np.array([(one + other) > 0 for one, other in means]),
            num_experts=counts.num_experts,
            signed=True,
        ),
    )


def _causes(counts: RoutingCounts, causes: Causes) -> Rival:
    refuse_other_model("causes", causes.model, "counts", counts.signature.model)
    num = len(causes.problems)
    gradient_PC = causes.gradient_PLE.reshape(num, -1)
    family = {trace.problem: trace.family for trace in counts.traces}
    return Rival(
        name="causes",
        words=f"d outcome / d log gain, above 0 where more gain makes it {causes.wanted}: {causes.outcome['words']}",
        claim="an effect on the outcome",
        estimate=RatioEstimate(
            problems=causes.problems,
            families=tuple(family.get(name, "") for name in causes.problems),
            terms=(Ratio(1.0 if causes.wanted == "higher" else -1.0, gradient_PC, np.ones((num, 1))),),
            selected_PC=(gradient_PC != 0) & (causes.selected_LE.ravel() > 0),
            num_experts=counts.num_experts,
            signed=True,
        ),
    )
