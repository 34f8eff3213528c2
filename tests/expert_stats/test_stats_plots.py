"""Pictures: well-formed, the same for the same data, with what they should show."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from expert_stats import (
    DosePoint,
    ExpertScores,
    dose_response,
    heat_map,
    rank_stability,
    score_experts,
    select_experts,
    select_placebo,
)
from stats_helpers import random_counts

POINTS = [DosePoint(gain, 0.7, 0.6, 0.8, 300 - gain, 280 - gain, 320 - gain) for gain in (0.0, 2.0, 64.0)]


def scores_of(num_layers: int = 3, num_experts: int = 12) -> ExpertScores:
    return score_experts(
        random_counts(2, num_layers=num_layers, num_experts=num_experts, tokens=80), missing_marker="skip"
    )


def labels(svg: str) -> str:
    """Texts stand as comments beside their outlines."""
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg.startswith("<svg")
    return " ".join(part.split("-->")[0].strip() for part in svg.split("<!--")[1:])


def test_the_heat_map_names_formula_layers_and_marks() -> None:
    scores = scores_of()
    plan = select_experts(scores, 2, max_q=None)
    svg = heat_map(scores, plan, select_placebo(scores, plan))
    found = labels(svg)
    for text in ("nPMI(&lt;think&gt;) − nPMI(&lt;/think&gt;)", "chosen", "placebo", "layer", "expert"):
        assert text in found or text.replace("&lt;", "<").replace("&gt;", ">") in found
    bare = heat_map(scores)
    assert "chosen" not in labels(bare)
    assert bare != svg


def test_pictures_depend_on_the_data_alone() -> None:
    scores = scores_of()
    plan = select_experts(scores, 2, max_q=None)
    assert heat_map(scores, plan) == heat_map(scores, plan)
    assert rank_stability(scores) == rank_stability(scores)
    assert dose_response(POINTS) == dose_response(list(reversed(POINTS)))
    assert "<dc:date>" not in heat_map(scores, plan)


def test_a_large_model_makes_a_small_file() -> None:
    assert len(heat_map(scores_of(num_layers=58, num_experts=256))) < 400_000


def test_a_ranking_without_intervals_can_be_drawn() -> None:
    scores = score_experts(random_counts(2, num_problems=1), missing_marker="skip")
    assert np.isnan(scores.low_LE).all()
    assert "Spearman undefined" in labels(rank_stability(scores))


def test_a_ranking_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="no expert is supported"):
        rank_stability(score_experts(random_counts(2), missing_marker="skip", min_support=10**6))


def test_dose_response_shows_every_gain_and_the_baseline() -> None:
    found = labels(dose_response(POINTS, DosePoint(1.0, 0.65, 0.6, 0.7, 300, 290, 310), chosen=64.0))
    for text in ("accuracy (%)", "thinking tokens", "gain", "unsteered", "chosen gain", "64", "2"):
        assert text in found
    with pytest.raises(ValueError, match="there is no point to draw"):
        dose_response([])
