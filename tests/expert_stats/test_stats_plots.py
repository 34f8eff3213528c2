"""Pictures: well-formed, the same for the same data, with what they should show."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from expert_stats import (
    DosePoint,
    ExpertScores,
    dose_response,
    family_matrix,
    heat_map,
    rank_stability,
    score_experts,
    select_experts,
    select_placebo,
)
from expert_stats.rivals import agreement_matrix, one_against_another
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


def test_a_long_title_breaks_into_lines_inside_the_picture() -> None:
    """It ran out of the picture: "log-odds that w"."""
    words = "d outcome / d log gain, above 0 where more gain makes it higher: log-odds that a thought goes on where it may end"
    scores = scores_of()
    long = dataclasses.replace(
        scores, method={**scores.method, "words": words}, options={**scores.options, "by": "causes"}
    )
    lines = [part.split("-->")[0].strip() for part in heat_map(long).split("<!--")[1:]]
    first = lines.index("causes: d outcome / d log gain, above 0 where more gain makes it")
    assert lines[first + 1] == "higher: log-odds that a thought goes on where it may end"
    heights = [ElementTree.fromstring(heat_map(one)).get("height", "").removesuffix("pt") for one in (long, scores)]
    assert float(heights[0]) > float(heights[1]) + 10, "room for a line more"


def test_experts_with_evidence_are_outlined_and_filled() -> None:
    scores = scores_of()
    best = scores.ranking()[0]
    proven = dataclasses.replace(scores, q_LE=np.where(scores.score_LE == best.score, 0.01, 0.9))
    none = dataclasses.replace(scores, q_LE=np.full(scores.score_LE.shape, 0.9))
    assert "evidence" in labels(heat_map(proven))
    assert "evidence" not in labels(heat_map(none))
    outline = "stroke: #0a7d33"
    assert heat_map(proven).count(outline) == 2, "the cell, and the legend"
    assert rank_stability(proven) != rank_stability(none)


def test_domains_and_rankings_are_compared_in_a_matrix() -> None:
    counts = random_counts(2, num_problems=24, num_experts=12, families=("maths", "physics", "law"))
    found = labels(family_matrix(score_experts(counts, missing_marker="skip")))
    for text in ("maths", "physics", "law", "rank correlation", "best 10 in common"):
        assert text in found
    with pytest.raises(ValueError, match="there are 1 rankings: two are needed to agree"):
        agreement_matrix(["a"], [[(1, 1, 1)]], [[(1, 1, 1)]], 3)
    undefined = [[[1.0, 1.0, 1.0], [None, None, None]], [[None, None, None], [1.0, 1.0, 1.0]]]
    assert "nan" not in labels(agreement_matrix(["a", "b"], undefined, undefined, 3))


def test_one_score_against_another_names_the_ends() -> None:
    first, second = np.arange(12.0), np.arange(12.0)[::-1] ** 2
    names = [f"3:{n}" for n in range(12)]
    found = labels(one_against_another(first, second, ("npmi", "causes"), names, first > 6, "rank correlation"))
    for text in ("3:0", "3:11", "npmi", "without evidence", "with evidence (q at most 0.05)", "rank correlation"):
        assert text in found
    assert "3:5" not in found


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
