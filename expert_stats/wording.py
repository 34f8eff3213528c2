"""What the evidence for experts says, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations

from expert_stats.evidence import EVERY, HALVES
from expert_stats.scores import ExpertScores, RankedExpert, reach_of


def without_evidence(scores: ExpertScores) -> str:
    """What the evidence of these scores rests on, and how far it goes, in one clause."""
    if claim := scores.method["claim"]:
        supported = scores.supported_LE
        passed = int((scores.q_LE[supported] <= 0.05).sum())
        return (
            f"{passed} of {int(supported.sum())} supported experts show {claim} (q at most 0.05, "
            f"{scores.method['problems']} problems)"
        )
    return (
        scores.cannot_answer or "; ".join(marker_sentences(scores)) or "no marker of positive coefficient can be tested"
    )


LEAST_PROBLEMS = 50
"""From so many on, 95% intervals cover .93 to .97 in every simulated world at every number of expected joint selections. Where kinds
of problems differ, those of frequent experts cover .90 to .92 with 8 problems, .91 to .94 with 15, .92 to .95 with 30
(tests/bench/evidence.py small)."""


def interval_lines(scores: ExpertScores) -> list[str]:
    """Where the intervals of experts named beforehand rest on too few problems, that they do."""
    num = scores.method["problems"]
    if num >= LEAST_PROBLEMS or scores.cannot_answer:
        return []
    return [
        f"NOTE: {num} problems are few ({LEAST_PROBLEMS} are enough): where problems differ in kind, the 95% interval of an expert that was "
        "named beforehand can be right only 90% of the time"
    ]


def fresh_lines(scores: ExpertScores, experts: Iterable[tuple[int, int]]) -> list[str]:
    """The 95% intervals from problems that did not choose: of these experts in other counts, where such were given to measure in;
    else of the best two of each half of the problems, in the other half. None with fewer than two problems a half."""
    asked, found = set(experts), []
    for name in (EVERY, *HALVES):
        own = [one for one in scores.fresh if one.chosen_by == name and math.isfinite(one.low)]
        own = [one for one in own if ((one.layer, one.expert) in asked if name == EVERY else one.rank <= _BEST)]
        if own:
            by = "" if name == EVERY else f", chosen by the {name}"
            each = ", ".join(f"layer {one.layer} expert {one.expert} {one.score:+.2f} ({reach_of(one)})" for one in own)
            found.append(
                f"FRESH: score and 95% interval from {own[0].problems} problems that did not choose it{by}: {each}"
            )
    return found


_BEST = 2
"""Experts that a plan takes where nobody says how many."""


def marker_sentences(scores: ExpertScores) -> list[str]:
    """One clause for every marker of positive coefficient: what stands behind its q."""
    found = []
    for index, test in enumerate(scores.tests):
        name = scores.marker_names[index]
        if test == "robust":
            q_LE = scores.q_MLE[index]
            passed = int((q_LE[scores.supported_LE] <= 0.05).sum())
            found.append(
                f"{name} stands inside thoughts: {passed} of {int(scores.supported_LE.sum())} supported experts go with it more "
                f"than their problem and place explain (q at most 0.05, {scores.num_problems} problems)"
            )
        if test == "tokens":
            found.append(_among_tokens(scores, index, name))
    return found


def evidence_sentence(scores: ExpertScores, experts: Iterable[tuple[int, int]], max_q: float) -> str:
    """The verdict on chosen experts, (layer, expert): cognitive by evidence, or unproven and why."""
    rows = {(row.layer, row.expert): row for row in scores.ranking(supported_only=False)}
    chosen = [(layer, expert, rows.get((layer, expert))) for layer, expert in experts]
    lacking = [(layer, expert) for layer, expert, row in chosen if row is None or not row.q <= max_q]
    if not lacking:
        return f"EVIDENCE: {_listed(chosen)} (q at most {max_q:g}); {without_evidence(scores)}"
    names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in lacking)
    if claim := scores.method["claim"]:
        return f"UNPROVEN: nothing shows {claim} of {names} ({_listed(chosen)}; asked: at most {max_q:g}); {without_evidence(scores)}"
    return (
        f"UNPROVEN: nothing shows that {names} answer{'s' * (len(lacking) == 1)} to the thought rather than to a token or to its "
        f"place ({_listed(chosen)}; asked: at most {max_q:g}); {without_evidence(scores)}"
    )


def family_lines(scores: ExpertScores) -> list[str]:
    """How far families of problems share experts, a line for every two: overlap of the best, rank correlation, with intervals; both as so
    many problems show them, since noise lowers them."""
    names, sizes, found = scores.families["families"], scores.families["problems"], []
    for one, other in combinations(range(len(names)), 2):
        cells = [scores.families[table][one][other] for table in ("overlap", "spearman")]
        if all(value is not None for cell in cells for value in cell):
            (shared, least, most), (rank, low, high) = cells
            found.append(
                f"{names[one]} and {names[other]}: {shared:.0%} of the best {scores.families['top']} in common "
                f"({least:.0%} to {most:.0%}), rank correlation {rank:+.2f} ({low:+.2f} to {high:+.2f}), by rankings from "
                f"{sizes[one]} and {sizes[other]} problems, whose noise lowers both"
            )
    return found


def _listed(chosen: Iterable[tuple[int, int, RankedExpert | None]]) -> str:
    return ", ".join(
        f"layer {layer} expert {expert} q {f'{row.q:.2g}' if row and math.isfinite(row.q) else 'none'}"
        for layer, expert, row in chosen
    )


def _among_tokens(scores: ExpertScores, index: int, name: str) -> str:
    compared, rank = scores.tokens["compared"], scores.tokens["rank"][index]
    if not compared or not rank:
        return f"{name} is one token in a fixed place, and no other tokens were counted to compare it with"
    closer = [row for row in scores.tokens["references"] if row[3] is not None][: rank - 1]
    behind = ", ".join(repr(text) if text else f"token {token}" for token, text, _, _ in closer[:3])
    place = f", behind {behind}{' and others' * (len(closer) > 3)}" if closer else ""
    return (
        f"{name} is one token in a fixed place, and number {rank} of {compared + 1} tokens by its closest expert{place}"
    )
