"""Selection: exactly as many as asked or an error, ties, provenance; placebo experts that match."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import ExpertScores, Unproven, score_experts, select_experts, select_placebo
from moe_steer.plan import ExpertGain, SteeringPlan, TopK
from stats_helpers import random_counts


def scores_of(seed: int = 2, num_experts: int = 12, **options: object) -> ExpertScores:
    return score_experts(random_counts(seed, num_experts=num_experts, tokens=80), missing_marker="skip", **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**4), st.integers(1, 24), st.sampled_from([None, 1, 4]), st.sampled_from([None, 0.0, 0.3]))
def test_exactly_as_many_as_asked_or_an_error(
    seed: int, top: int, min_support: int | None, min_score: float | None
) -> None:
    scores = scores_of(seed)
    qualify = [
        row
        for row in scores.ranking(supported_only=False)
        if row.supported and row.support >= (min_support or 0) and (min_score is None or row.score > min_score)
    ]
    if len(qualify) >= top:
        plan = select_experts(scores, top, 8.0, max_q=None, min_support=min_support, min_score=min_score)
        assert [(entry.layer, entry.expert) for entry in plan.experts] == [
            (row.layer, row.expert) for row in qualify[:top]
        ]
        assert {entry.gain for entry in plan.experts} == {8.0}
    else:
        with pytest.raises(ValueError, match=f"top is {top}, but only {len(qualify)} experts qualify"):
            select_experts(scores, top, max_q=None, min_support=min_support, min_score=min_score)


def test_the_defaults_are_those_of_rice_and_the_plan_says_where_it_comes_from(tmp_path: Path) -> None:
    scores = scores_of()
    plan = select_experts(scores, max_q=None)
    assert [entry.gain for entry in plan.experts] == [64.0, 64.0]
    assert (plan.scope, plan.renormalize) == ("all", False)
    assert plan.model == {"model_type": "deepseek_v3", "num_layers": 3, "num_experts": 12, "name": "here"}
    assert plan.provenance["counts_sha256"] == scores.counts_digest
    assert plan.provenance["coefficients"] == {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
    assert plan.provenance["options"]["by"] == "npmi"
    assert [row["score"] for row in plan.provenance["experts"]] == [row.score for row in scores.ranking()[:2]]
    plan.save(tmp_path / "plan.json")
    assert SteeringPlan.load(tmp_path / "plan.json").to_dict() == json.loads(json.dumps(plan.to_dict()))


def test_experts_without_evidence_are_refused_unless_that_is_asked_for() -> None:
    scores = scores_of()
    best = scores.ranking()[0]
    assert best.q > 0.05
    with pytest.raises(
        Unproven, match="top is 1, but only 0 experts have evidence .q at most 0.05; <think> stands"
    ) as caught:
        select_experts(scores, 1)
    assert "--unproven" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert select_experts(scores, 1, max_q=None).provenance["evidence"] == "unproven"
    proven = dataclasses.replace(scores, q_LE=np.where(scores.score_LE == best.score, 0.01, np.nan))
    plan = select_experts(proven, 1)
    assert [(entry.layer, entry.expert) for entry in plan.experts] == [(best.layer, best.expert)]
    assert plan.provenance["evidence"] == "shown"
    with pytest.raises(Unproven, match="only 1 experts have evidence"):
        select_experts(proven, 2)


def test_gain_zero_suppresses_and_nonsense_is_refused() -> None:
    scores = scores_of()
    assert (
        select_experts(scores, 1, gain=0.0, max_q=None, scope="thought", renormalize=True).to_dict()["experts"][0][
            "gain"
        ]
        == 0.0
    )
    for top in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="give a whole number >= 1"):
            select_experts(scores, top)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a finite number >= 0"):
        select_experts(scores, 1, gain=float("nan"), max_q=None)


FIRING = [[100, 90, 110, 10, 400, 95, 0, 105], [5, 6, 7, 50, 50, 50, 0, 50]]


def placebo_scores() -> ExpertScores:
    nobody = np.zeros((2, 8), dtype=np.bool_)
    return dataclasses.replace(scores_of(num_experts=8), expert_LE=np.array(FIRING), supported_LE=nobody)


def test_a_placebo_matches_layer_gain_and_firing_rate() -> None:
    plan = SteeringPlan(experts=[ExpertGain(1, 0, 64.0), ExpertGain(2, 0, 16.0)], scope="thought", renormalize=True)
    drawn = set()
    for seed in range(40):
        placebo = select_placebo(placebo_scores(), plan, seed, num_candidates=3)
        first, second = placebo.experts
        assert (first.layer, first.gain, second.layer, second.gain) == (1, 64.0, 2, 16.0)
        assert first.expert in {5, 7, 2}  # fire 95, 105 and 110 times; the planned one 100
        assert second.expert in {1, 2, 3}  # 6, 7, and the lowest id of those with 50
        assert (placebo.scope, placebo.renormalize) == ("thought", True)
        assert placebo == select_placebo(placebo_scores(), plan, seed, num_candidates=3)
        drawn.add((first.expert, second.expert))
    assert len(drawn) > 5


def test_a_placebo_keeps_what_is_done_to_each_expert() -> None:
    entries = [
        ExpertGain(1, 0, 2.0, force="in"),
        ExpertGain(1, 3, force="out"),
        ExpertGain(2, 0, logit_bias=1.5),
    ]
    plan = SteeringPlan(experts=entries, top_k=[TopK(1, 3, "thought")])
    placebo = select_placebo(placebo_scores(), plan, 0)
    assert [dataclasses.replace(entry, expert=0) for entry in placebo.experts] == [
        dataclasses.replace(entry, expert=0) for entry in entries
    ]
    assert placebo.top_k == plan.top_k
    assert not {(e.layer, e.expert) for e in placebo.experts} & {(e.layer, e.expert) for e in entries}


def test_a_placebo_names_no_planned_expert_and_none_twice() -> None:
    plan = SteeringPlan(experts=[ExpertGain(1, expert, 2.0) for expert in (0, 2, 5)])
    for seed in range(20):
        experts = [entry.expert for entry in select_placebo(placebo_scores(), plan, seed).experts]
        assert len({*experts, 0, 2, 5}) == 6
        assert 6 not in experts  # never fires: it would be no placebo


def test_the_placebo_says_how_well_it_matches() -> None:
    plan = SteeringPlan(experts=[ExpertGain(1, 0, 64.0)])
    placebo = select_placebo(placebo_scores(), plan, 1)
    match = placebo.provenance["experts"][0]
    assert (match["instead_of"], match["expert"]) == (0, placebo.experts[0].expert)
    assert match["rate_of_planned"] == 100 / placebo_scores().num_tokens
    assert len(match["candidates"]) == 4
    assert placebo.provenance["placebo_of"] == plan.digest()
    assert placebo.provenance["seed"] == 1


def test_counts_serve_as_well_as_scores() -> None:
    counts = random_counts(2, num_experts=12, tokens=80)
    scores = score_experts(counts, missing_marker="skip")
    plan = select_experts(scores, max_q=None)
    nobody = dataclasses.replace(scores, supported_LE=np.zeros_like(scores.supported_LE))
    assert select_placebo(counts, plan, 3) == select_placebo(nobody, plan, 3)


def test_experts_that_would_qualify_make_no_placebo_while_there_are_others() -> None:
    plan = SteeringPlan(experts=[ExpertGain(1, 0, 64.0)])
    scores = placebo_scores()
    near = np.zeros((2, 8), dtype=np.bool_)
    near[0, [5, 7, 2]] = True
    rivals = dataclasses.replace(scores, supported_LE=near, score_LE=np.ones((2, 8)))
    drawn = {select_placebo(rivals, plan, seed, num_candidates=2).experts[0].expert for seed in range(20)}
    assert drawn == {1, 4}  # fire 90 and 400 times; 95, 105 and 110 are rivals
    assert {select_placebo(scores, plan, seed, num_candidates=2).experts[0].expert for seed in range(20)} == {5, 7}
    all_rivals = dataclasses.replace(rivals, supported_LE=np.ones((2, 8), dtype=np.bool_))
    match = select_placebo(all_rivals, plan, 0).provenance["experts"][0]
    assert match["qualifies_itself"]
    negative = dataclasses.replace(rivals, score_LE=-np.ones((2, 8)))
    assert select_placebo(negative, plan, 0).experts == select_placebo(scores, plan, 0).experts


def test_what_cannot_be_matched_is_refused() -> None:
    scores = placebo_scores()
    everything = SteeringPlan(experts=[ExpertGain(1, expert, 2.0) for expert in (0, 1, 2, 3, 4, 5, 7)])
    with pytest.raises(ValueError, match="layer 1 has no expert left that fires"):
        select_placebo(scores, everything)
    with pytest.raises(ValueError, match="the plan names no experts"):
        select_placebo(scores, SteeringPlan())
    with pytest.raises(ValueError, match="layer 0 .* has no experts in this model: layers with experts are 1-2"):
        select_placebo(scores, SteeringPlan(experts=[ExpertGain(0, 0, 2.0)]))
    with pytest.raises(ValueError, match="expert 8 at layer 1 does not exist"):
        select_placebo(scores, SteeringPlan(experts=[ExpertGain(1, 8, 2.0)]))
    with pytest.raises(ValueError, match="num_candidates is 0"):
        select_placebo(scores, SteeringPlan(experts=[ExpertGain(1, 0, 2.0)]), num_candidates=0)
