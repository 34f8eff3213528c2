"""Evidence in words, and counts of version 1 that say what they cannot answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from expert_stats import (
    RoutingCounts,
    Unproven,
    evidence_sentence,
    family_lines,
    interval_lines,
    score_experts,
    select_experts,
)
from expert_stats.trace_counts import References
from stats_helpers import changed, random_counts
from test_counts import old_file
from worlds import PLANTED, counts_of_world


def test_planted_experts_are_called_evidence_and_others_unproven() -> None:
    scores = score_experts(counts_of_world("all", 100, 0, planted=1.2))
    planted = [divmod(int(cell), 64) for cell in PLANTED[:2]]
    shown = evidence_sentence(scores, planted, 0.05)
    assert shown.startswith("EVIDENCE: layer 0 expert 3 q ")
    assert "Wait stands inside thoughts" in shown
    assert "100 problems" in shown
    other = evidence_sentence(scores, [planted[0], (1, 63)], 0.05)
    assert other.startswith("UNPROVEN: nothing shows that layer 1 expert 63 answers to the thought")
    best = select_experts(scores, 2)
    assert best.provenance["evidence"] == "shown"
    assert {(entry.layer, entry.expert) for entry in best.experts} <= {divmod(int(cell), 64) for cell in PLANTED}


def fixed_place(closeness: int) -> RoutingCounts:
    """The first marker always in the opening; 24 reference tokens, of which one is as closely bound to an expert as asked."""
    counts = random_counts(1, num_problems=12, num_experts=8, tokens=400)
    for number, (trace, _, joint_MLE) in enumerate(counts.unpacked()):
        marker_MB, joint = trace.marker_MB.copy(), np.zeros_like(joint_MLE)
        joint[1:] = joint_MLE[1:]
        joint[0, :, :2] = 1
        marker_MB[0] = 0
        marker_MB[0, 0] = 1
        counts = changed(counts, number, marker_MB=marker_MB, joint_MLE=joint)
    seen_R = np.full(24, 40)
    joint_RLE = np.tile(np.full(8, 10), (24, 2, 1))
    joint_RLE[5] = [closeness, 80 - closeness, 0, 0, 0, 0, 0, 0]
    texts = tuple("." if number == 5 else "" for number in range(24))
    return dataclasses.replace(counts, references=References(tuple(range(24)), texts, joint_RLE, seen_R))


def test_a_marker_in_a_fixed_place_is_judged_among_tokens() -> None:
    scores = score_experts(fixed_place(10), missing_marker="skip")
    assert scores.tests[0] == "tokens"
    best = [(row.layer, row.expert) for row in scores.ranking()[:1]]
    assert np.nanmin(scores.q_MLE[0]) == pytest.approx(1 / 25) or scores.tokens["rank"][0] == 2
    closer = score_experts(fixed_place(40), missing_marker="skip")
    words = evidence_sentence(closer, best, 0.01)
    assert words.startswith("UNPROVEN")
    assert f"<think> is one token in a fixed place, and number {closer.tokens['rank'][0]} of 25 tokens" in words


def test_few_problems_are_said_to_give_unsure_intervals() -> None:
    (line,) = interval_lines(score_experts(random_counts(2, num_problems=49), missing_marker="skip"))
    assert line.startswith("NOTE: 49 problems are few (50 are enough): where problems differ in kind")
    assert interval_lines(score_experts(random_counts(2, num_problems=50), missing_marker="skip")) == []


def test_version_1_says_what_it_cannot_answer(tmp_path: Path) -> None:
    old_file(tmp_path / "old.safetensors", random_counts(2, num_problems=40, tokens=80))
    scores = score_experts(RoutingCounts.load(tmp_path / "old.safetensors"))
    assert scores.num_problems == 0
    assert np.isnan(scores.q_MLE).all()
    assert np.isfinite(scores.low_LE).any()
    with pytest.raises(Unproven, match="counts of version 1 keep groups of traces: the robust test") as caught:
        select_experts(scores, 1)
    assert "\n" not in str(caught.value)


def test_families_are_compared_in_lines() -> None:
    traces = [
        dataclasses.replace(trace, trace_id=f"{name}/{trace.trace_id}", family=name)
        for name, seed in (("maths", 1), ("physics", 2))
        for trace in counts_of_world("iid", 20, seed, planted=1.5).traces
    ]
    scores = score_experts(dataclasses.replace(counts_of_world("iid", 1, 0), traces=tuple(traces)))
    lines = family_lines(scores)
    assert len(lines) == 1
    assert lines[0].startswith("maths and physics: ")
    assert "of the best 10 in common (" in lines[0]
    assert family_lines(score_experts(random_counts(2))) == []
