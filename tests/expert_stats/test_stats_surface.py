"""The room's public names, its light import, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import expert_stats
from expert_stats.evidence import measure
from moe_steer.tokens import markers

ROOT = Path(__file__).parents[2]


def test_public_names_are_pinned_and_all_there() -> None:
    assert sorted(expert_stats.__all__) == [
        "BASES", "BY", "CountsSignature", "DosePoint", "ExpertScores", "MAX_Q", "MISSING_MARKER", "MarkedSequence",
        "Marker", "MarkerSet", "Rollout", "RoutedTrace", "RoutingCounter", "RoutingCounts", "RoutingRecorder", "Trace",
        "TraceCounts", "TraceFiring", "Unproven", "ZERO_JOINT", "answer_pairs", "batches", "collect_contrast",
        "collect_counts", "concise_and_verbose", "count_routed", "decision_sites", "decode_array", "dose_response",
        "evidence_sentence", "family_lines", "family_matrix", "fresh_lines", "heat_map", "interval_lines", "prompt_pairs", "rank_stability", "read_rollouts", "read_traces",
        "reduce_counts", "reference_tokens", "routed_trace", "run_traces", "score_experts", "scores_and_estimate", "select_experts",
        "select_placebo", "sum_counts", "thought_pairs", "trace_from_ids", "write_traces",
    ]  # fmt: skip
    assert all(hasattr(expert_stats, name) for name in expert_stats.__all__)
    with pytest.raises(AttributeError, match="module 'expert_stats' has no attribute 'nothing'"):
        _ = expert_stats.nothing


def heavy(*modules: str) -> str:
    names = ", ".join(modules)
    code = f"import sys, {names}; print(sorted({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()


def test_pure_modules_import_neither_torch_nor_transformers() -> None:
    rooms = (
        "expert_stats.counts",
        "expert_stats.npmi",
        "expert_stats.select",
        "expert_stats.scores",
        "expert_stats.evidence.sums",
    )
    assert heavy(*rooms, "moe_steer.tokens.markers", "moe_steer.tokens.traces") == "[]"


def test_counting_imports_torch_alone() -> None:
    assert heavy("expert_stats.collect") == "['torch']"


def test_examples_in_docstrings_hold() -> None:
    for module in (markers, measure):
        tried = doctest.testmod(module)
        assert tried.attempted
        assert tried.failed == 0
