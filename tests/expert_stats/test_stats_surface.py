"""The room's public names, its light import, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import expert_stats
from expert_stats import npmi
from moe_steer.tokens import markers

ROOT = Path(__file__).parents[2]


def test_public_names_are_pinned_and_all_there() -> None:
    assert sorted(expert_stats.__all__) == [
        "ExpertScores", "MarkedSequence", "Marker", "MarkerSet", "RoutingCounter", "RoutingCounts", "Trace", "answer_pairs",
        "collect_contrast", "collect_counts", "concise_and_verbose", "decision_sites", "prompt_pairs", "read_traces",
        "reduce_counts", "score_experts", "select_experts", "select_placebo", "thought_pairs", "trace_from_ids",
        "write_traces",
    ]  # fmt: skip
    assert all(hasattr(expert_stats, name) for name in expert_stats.__all__)
    with pytest.raises(AttributeError, match="module 'expert_stats' has no attribute 'nothing'"):
        _ = expert_stats.nothing


def heavy(*modules: str) -> str:
    names = ", ".join(f"expert_stats.{module}" for module in modules)
    code = f"import sys, {names}; print(sorted({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()


def test_pure_modules_import_neither_torch_nor_transformers() -> None:
    assert (
        heavy("counts", "npmi", "select", "scores", "uncertainty", "markers", "traces", "sites", "token_forms") == "[]"
    )


def test_counting_imports_torch_alone() -> None:
    assert heavy("collect", "reduce") == "['torch']"


def test_examples_in_docstrings_hold() -> None:
    for module in (markers, npmi):
        tried = doctest.testmod(module)
        assert tried.attempted
        assert tried.failed == 0
