"""nPMI and the combined score: numbers worked by hand, an independent loop, laws, and the edges."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import RoutingCounts, score_experts
from expert_stats.evidence import SHRINK, Measure, npmi
from stats_helpers import changed, counts_of, random_counts

RICE = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}


@pytest.mark.parametrize(
    ("joint", "expert", "marker", "total", "expected"),
    [
        (4, 8, 4, 1024, 7 / 8),
        (4, 4, 4, 1024, 1.0),
        (1, 32, 32, 1024, 0.0),
        (0, 8, 4, 1024, -1.0),
        (2, 16, 4, 1024, (math.log2(2 / 4) - math.log2(16 / 1024)) / 9),  # 5/9
        (1, 512, 4, 1024, -1 / 10),  # half as often as elsewhere: log2(1/2) / log2(1024)
    ],
)
def test_hand_checks(joint: int, expert: int, marker: int, total: int, expected: float) -> None:
    assert float(npmi(*map(np.array, (joint, expert, marker, total)))) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("joint", "expert", "marker", "total"), [(0, 0, 4, 64), (0, 4, 0, 64), (64, 64, 64, 64), (0, 0, 0, 0)]
)
def test_undefined_cells_are_masked(joint: int, expert: int, marker: int, total: int) -> None:
    assert math.isnan(float(npmi(*map(np.array, (joint, expert, marker, total)))))


def naive(joint: int, expert: int, marker: int, total: int) -> float:
    """Eq. 2-4 of the paper, step by step, in Python floats."""
    if expert == 0 or marker == 0 or joint == total:
        return math.nan
    if joint == 0:
        return -1.0
    p_expert_given_marker, p_expert, p_both = joint / marker, expert / total, joint / total
    return math.log2(p_expert_given_marker / p_expert) / -math.log2(p_both)


def naive_score(counts: RoutingCounts, layer: int, expert: int, zero_joint: str) -> float:
    total, value, arrays = counts.num_tokens, 0.0, counts.grouped()
    for index, name in enumerate(counts.marker_names):
        joint = sum(int(arrays["joint_GMLE"][g, index, layer, expert]) for g in range(16))
        fired = sum(int(arrays["expert_GLE"][g, layer, expert]) for g in range(16))
        seen = sum(int(arrays["marker_GM"][g, index]) for g in range(16))
        term = naive(joint, fired, seen, total)
        if joint == 0 and not math.isnan(term) and zero_joint != "minus_one":
            half = min(0.0, math.log2(0.5 / seen / (fired / total)) / -math.log2(0.5 / total))
            term = half if zero_joint == "half" else 0.0
        value += RICE[name] * term
    return value


def naive_shrunk(counts: RoutingCounts, layer: int, expert: int) -> float:
    """By the definition: nPMI of a marker with whose tokens a tenth of any tokens is mixed."""
    value, arrays = 0.0, counts.grouped()
    for index, name in enumerate(counts.marker_names):
        joint, fired = (
            int(arrays["joint_GMLE"].sum(0)[index, layer, expert]),
            int(arrays["expert_GLE"].sum(0)[layer, expert]),
        )
        seen, total = int(arrays["marker_GM"].sum(0)[index]), counts.num_tokens
        mixed = 0.9 * joint / seen + 0.1 * fired / total
        value += RICE[name] * math.log2(mixed / (fired / total)) / -math.log2(mixed * seen / total)
    return value


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), tokens=st.integers(30, 60))
def test_the_default_score_equals_its_definition(seed: int, tokens: int) -> None:
    counts = random_counts(seed, num_experts=7, tokens=tokens)
    if not counts.occurrences_M.all():
        return
    scores = score_experts(counts)
    assert SHRINK == 0.1
    for layer in range(2):
        for expert in range(7):
            if scores.expert_LE[layer, expert]:
                expected = naive_shrunk(counts, layer, expert)
                assert scores.score_LE[layer, expert] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("zero_joint", ["half", "skip", "minus_one"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), tokens=st.integers(12, 60))
def test_scores_equal_an_independent_loop(zero_joint: str, seed: int, tokens: int) -> None:
    counts = random_counts(seed, num_experts=7, tokens=tokens)
    if not counts.occurrences_M.all():
        return
    scores = score_experts(counts, by="rice", zero_joint=zero_joint)
    for layer in range(2):
        for expert in range(7):
            expected = naive_score(counts, layer, expert, zero_joint)
            assert scores.score_LE[layer, expert] == pytest.approx(expected, abs=1e-12, nan_ok=True)
            for marker in range(3):
                joint = int(counts.grouped()["joint_GMLE"].sum(0)[marker, layer, expert])
                fired, seen = (
                    int(counts.grouped()["expert_GLE"].sum(0)[layer, expert]),
                    int(counts.occurrences_M[marker]),
                )
                alone = naive(joint, fired, seen, counts.num_tokens)
                assert scores.npmi_MLE[marker, layer, expert] == pytest.approx(alone, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(("expert", "expected"), [(2**49 - 1, 1.0), (2**49, 0.0)])
def test_npmi_keeps_its_digits_where_almost_every_token_is_counted(expert: int, expected: float) -> None:
    marker = 2**49 - 1
    assert float(npmi(*map(np.array, (marker, expert, marker, 2**49)))) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_npmi_lies_between_minus_one_and_one(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 10**15))
    expert, marker = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    joint = data.draw(st.integers(max(0, expert + marker - total), min(expert, marker)))
    value = float(npmi(*map(np.array, (joint, expert, marker, total))))
    assert math.isnan(value) or -1.0 <= value <= 1.0
    if joint and joint * total == expert * marker and joint < total:
        assert abs(value) < 1e-9
    if 0 < joint == expert == marker < total:
        assert value == 1.0


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_renaming_experts_renames_scores(seed: int, experts: list[int]) -> None:
    counts = moved = random_counts(seed, num_experts=5)
    for number, (_, expert_BLE, joint_MLE) in enumerate(counts.unpacked()):
        moved = changed(moved, number, expert_BLE=expert_BLE[..., experts], joint_MLE=joint_MLE[..., experts])
    before, after = score_experts(counts, missing_marker="skip"), score_experts(moved.check(), missing_marker="skip")
    for table in ("npmi_MLE", "score_LE", "p_MLE", "q_MLE", "supported_LE"):
        np.testing.assert_allclose(getattr(before, table)[..., experts], getattr(after, table), rtol=1e-9)
    np.testing.assert_allclose(before.error_LE[..., experts], after.error_LE, rtol=1e-9, atol=1e-12)


def test_a_table_worked_by_hand() -> None:
    # total 1024, marker 4 times. Expert 0: always there, 8 in all -> 7/8. Expert 1: never there -> -1; expert 2: never used.
    scores = score_experts(
        counts_of([(4, 8, 4, 1024), (0, 500, 4, 1024), (0, 0, 4, 1024)]), {"<think>": 1.0}, by="rice", zero_joint="half"
    )
    np.testing.assert_array_equal(scores.npmi_MLE[0, 0], [0.875, -1.0, math.nan, -1.0])
    half = (math.log2(0.5 / 4) + math.log2(1024 / 500)) / math.log2(1024 / 0.5)
    assert scores.score_LE[0, :2].tolist() == pytest.approx([0.875, half])
    assert scores.supported_LE[0].tolist() == [True, False, False, False]
    assert scores.support_LE[0].tolist() == [4, 0, 0, 0]
    assert scores.rate_LE[0, 0] == 8 / 1024
    assert np.isnan(scores.p_MLE).all()  # one problem shows nothing


def test_going_from_one_joint_selection_to_none_never_pays() -> None:
    """With "half" a marker of negative coefficient rewards absence more the fewer joint selections there are, without a jump."""
    for expert in (2, 40, 300, 900):
        terms = []
        for joint in (0, 1, 2):
            counts = counts_of([(joint, expert, 100, 2048)])
            markers = {**counts.signature.markers, "coefficients": [1.0]}
            counts = dataclasses.replace(counts, signature=dataclasses.replace(counts.signature, markers=markers))
            terms.append(float(score_experts(counts, by="rice", zero_joint="half").score_LE[0, 0]))
        assert terms[0] <= terms[1] <= terms[2]
        assert terms[0] <= 0.0
        assert terms[0] > -0.6


def test_minimum_support_and_its_default() -> None:
    counts = counts_of([(3, 4, 60, 4096), (6, 8, 60, 4096), (30, 40, 60, 4096)])
    assert score_experts(counts).supported_LE[0, :3].tolist() == [False, True, True]  # a tenth of 60
    assert score_experts(counts).options["min_support"] == [6]
    assert score_experts(counts, min_support=3).supported_LE[0, :3].tolist() == [True, True, True]
    assert score_experts(counts, min_support=31).supported_LE[0, :3].tolist() == [False, False, False]
    assert score_experts(counts_of([(2, 3, 2, 64)])).options["min_support"] == [2]  # at most all occurrences
    # Often at the marker, but no oftener than elsewhere: not supported by it.
    assert not score_experts(counts_of([(30, 2048, 60, 4096)])).supported_LE[0, 0]


def without(counts: RoutingCounts, marker: int) -> RoutingCounts:
    """The same tokens, in which one marker never occurs."""
    for number, (trace, _, joint_MLE) in enumerate(counts.unpacked()):
        joint, seen = joint_MLE.copy(), trace.marker_MB.copy()
        joint[marker], seen[marker] = 0, 0
        counts = changed(counts, number, joint_MLE=joint, marker_MB=seen)
    return counts.check()


def test_a_marker_that_never_occurs_is_an_error_or_left_out() -> None:
    counts = without(random_counts(1), 2)
    with pytest.raises(
        ValueError, match="marker 'Alternatively' never occurs in the 4 traces: .* missing_marker='skip'"
    ):
        score_experts(counts)
    left_out = score_experts(counts, missing_marker="skip")
    zero = score_experts(counts, {"Alternatively": 0.0})
    np.testing.assert_array_equal(left_out.score_LE, zero.score_LE)
    assert np.isnan(left_out.npmi_MLE[2]).all()
    with pytest.raises(ValueError, match="no marker of positive coefficient occurs .*: count more or longer"):
        score_experts(without(random_counts(1), 0), missing_marker="skip")
    nothing = score_experts(without(random_counts(1), 0), missing_marker=None)
    assert np.isnan(nothing.score_LE).all()
    assert not nothing.supported_LE.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "rice", "zero_joint": "zero"}, "zero_joint 'zero'"),
        ({"by": "pmi"}, "by is 'pmi'"),
        ({"zero_joint": "half"}, "zero_joint 'half' is a rule of by='rice'"),
        ({"missing_marker": "ignore"}, "missing_marker 'ignore'"),
        ({"min_support": 0}, "min_support is 0: give a whole number >= 1"),
        ({"coefficients": {"Hmm": 1.0}}, "a coefficient is given for 'Hmm'"),
        ({"coefficients": {"<think>": -1.0}}, "at least one must be positive"),
        ({"coefficients": {"<think>": math.inf}}, "at least one must be positive, all finite"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_experts(random_counts(1), **options)  # type: ignore[arg-type]


def test_counts_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="the counts hold no tokens"):
        score_experts(RoutingCounts.zeros(random_counts(0).signature))


def test_every_choice_is_recorded() -> None:
    options = score_experts(random_counts(1)).options
    assert set(options) == {
        "by", "shrink", "zero_joint", "min_support", "missing_marker", "base", "prompt_tail", "counted",
        "position", "token", "repeats", "whole_words",
    }  # fmt: skip


def test_given_coefficients_change_those_and_no_others() -> None:
    counts = random_counts(1)
    terms = {
        name: score_experts(counts, {"<think>": 1.0, "</think>": 0.0, "Alternatively": 0.0, name: 1.0}).score_LE
        for name in RICE
    }
    alone = terms["<think>"]
    changed = score_experts(counts, {"Alternatively": 2.0})
    assert changed.coefficients == (1.0, -1.0, 2.0)
    expected = alone - (terms["</think>"] - alone) + 2 * (terms["Alternatively"] - alone)
    np.testing.assert_allclose(changed.score_LE, expected, atol=1e-12)


@pytest.mark.parametrize("by", ["npmi", "rice"])
def test_slopes_are_the_derivatives_of_the_score(by: str) -> None:
    rng = np.random.default_rng(1)
    joint, expert = rng.integers(1, 20, (3, 9)).astype(float), rng.integers(60, 400, 9).astype(float)
    marker, total = np.array([40.0, 70.0, 90.0]), 2000.0
    measure = Measure(np.array([1.0, -1.0, 0.5]), by)
    slopes = measure.slopes(joint, expert, marker, total)  # type: ignore[arg-type]

    def moved(step: float, dj: float = 0, dm: float = 0, de: float = 0, dt: float = 0, at: int = 0) -> float:
        more, seen = joint.copy(), marker.copy()
        more[at] += dj * step
        seen[at] += dm * step
        return measure.score(more, expert + de * step, seen, np.array(total + dt * step))

    for name, step in (("expert_C", {"de": 1.0}), ("total_C", {"dt": 1.0})):
        central = (moved(1e-4, **step) - moved(-1e-4, **step)) / 2e-4
        np.testing.assert_allclose(getattr(slopes, name), central, rtol=1e-6, atol=1e-12)
    for at in range(3):
        for name, step in (("joint_MC", {"dj": 1.0}), ("marker_MC", {"dm": 1.0})):
            central = (moved(1e-4, **step, at=at) - moved(-1e-4, **step, at=at)) / 2e-4
            np.testing.assert_allclose(getattr(slopes, name)[at], central, rtol=1e-6, atol=1e-12)


def test_the_score_has_one_estimand_at_any_number_of_traces() -> None:
    """Rare experts at `<think>`, never selected at `</think>`: ten times the traces leave the default score where it is, and
    move RICE's with a rule for zeros."""

    def scores(size: int, **options: str) -> float:
        joint, expert = np.array([[30 * size], [0]]), np.array([900 * size])
        marker, total = np.array([60 * size, 60 * size]), np.array(270_000 * size)
        return float(Measure(np.array([1.0, -1.0]), **options).score(joint, expert, marker, total)[0])

    assert scores(100) == pytest.approx(scores(1), abs=1e-12)
    assert scores(100, by="rice", zero_joint="half") - scores(1, by="rice", zero_joint="half") > 0.1
