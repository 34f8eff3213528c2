from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from scipy import stats

from graded_rows import row, simulated, table
from reasoning_evals.comparing.compare import compare_arms, differences
from reasoning_evals.comparing.comparison import Comparison, Flip
from reasoning_evals.comparing.statistics import mcnemar_p, wilson_interval
from reasoning_evals.comparing.verdicts import HELPED, HURT, NOTHING, Tuning, unanswered_notes


def test_numbers_by_hand() -> None:
    found = compare_arms(
        table({"baseline": ["1100", "0000", "1111", "tn0e"], "steered": ["1110", "1000", "1110", "0000"]})
    )
    base, steered = found.arm("baseline"), found.arm("steered")
    assert base.accuracy.mean == (0.5 + 0 + 1 + 0) / 4
    assert steered.accuracy.mean == (0.75 + 0.25 + 0.75 + 0) / 4
    assert (base.wrong, base.truncated, base.no_answer, base.grader_failed) == (7 / 16, 1 / 16, 1 / 16, 1 / 16)
    assert base.pass_at_k == 2 / 4
    # p0 has a tie of two votes each; p1 and p2 are clear; the one voter of p3 is wrong.
    assert base.majority_at_k == (0.5 + 0 + 1 + 0) / 4
    assert {name: (d.num_problems, d.mean) for name, d in base.domains.items()} == {
        "maths": (2, 0.75),
        "physics": (2, 0.0),
    }
    pair = found.pair("baseline", "steered")
    assert pair.accuracy.mean == pytest.approx((0.25 + 0.25 - 0.25 + 0) / 4)
    assert (pair.wins, pair.losses, pair.ties) == (2, 1, 1)
    assert pair.gained == (Flip("p0", 0.5, 0.75, 2, 2), Flip("p1", 0.0, 0.25, 0, 0))
    assert pair.lost == (Flip("p2", 1.0, 0.75, 3, 3),)
    assert pair.num_both_solved == 2
    assert pair.tokens_both_solved is not None
    # p0: correct samples 0, 1 against 0, 1, 2; p2: 0..3 against 0..2; a sample's tokens are its problem's plus its number.
    assert pair.tokens_both_solved.mean == pytest.approx(((41 - 40.5) + (47 - 47.5)) / 2)
    assert found.num_samples == 4
    assert found.num_clusters is None


def test_paired_difference_is_scipys_on_problem_means() -> None:
    rows = simulated(40, 4, {"baseline": 0.0, "steered": 0.1})
    pair = compare_arms(rows).pair("baseline", "steered")
    means = {
        arm: [np.mean([r.correct for r in rows if (r.arm, r.problem_id) == (arm, f"p{i}")]) for i in range(40)]
        for arm in ("baseline", "steered")
    }
    reference = stats.ttest_rel(means["steered"], means["baseline"])
    assert pair.accuracy.p_value == pytest.approx(reference.pvalue)
    assert pair.accuracy.low == pytest.approx(reference.confidence_interval().low)


def test_sides_change_the_sign_only() -> None:
    rows = simulated(30, 3, {"baseline": 0.0, "steered": 0.1})
    there = compare_arms(rows).pair("baseline", "steered")
    back = compare_arms(rows, pairs=[("steered", "baseline")]).pair("steered", "baseline")
    assert back.accuracy.mean == pytest.approx(-there.accuracy.mean)
    assert (back.wins, back.losses) == (there.losses, there.wins)
    assert {flip.problem_id for flip in back.gained} == {flip.problem_id for flip in there.lost}


def test_order_of_rows_and_problem_names_change_nothing_else() -> None:
    rows = simulated(20, 2, {"baseline": 0.0, "steered": 0.2})
    shuffled = sorted(rows, key=lambda r: (r.arm, r.problem_id, -r.sample_idx))
    assert {pair.sentence for pair in compare_arms(rows).pairs} == {
        pair.sentence for pair in compare_arms(shuffled).pairs
    }


@pytest.mark.parametrize(("effect", "verdict"), [(0.3, HELPED), (-0.3, HURT), (0.0, NOTHING)])
def test_verdict_in_words(effect: float, verdict: str) -> None:
    found = compare_arms(simulated(120, 4, {"baseline": 0.0, "steered": effect}, seed=3)).pair("baseline", "steered")
    assert found.verdict == verdict
    if verdict == NOTHING:
        assert f"could have shown (80% power) is {100 * found.accuracy.detectable:.1f} points" in found.sentence  # type: ignore[operator]
        assert found.sentence.startswith("steered against baseline: no effect shown, ")
    else:
        assert found.sentence.startswith(
            f"steered against baseline: {verdict}, +" if effect > 0 else f"steered against baseline: {verdict}, -"
        )
    assert "120 problems x 4 samples" in found.sentence


def test_one_sample_a_problem_goes_by_the_exact_test() -> None:
    """5 gained and none lost of 30: the t test says p = .02, the exact test .0625."""
    baseline = ["1"] * 15 + ["0"] * 15
    found = compare_arms(table({"baseline": baseline, "steered": ["1"] * 20 + ["0"] * 10}))
    pair = found.pair("baseline", "steered")
    assert pair.mcnemar_p == pytest.approx(mcnemar_p(5, 0)) == 0.0625
    assert pair.accuracy.p_value < 0.05
    assert pair.verdict == NOTHING
    assert "exact McNemar test" in pair.sentence
    assert "The paired t test alone would say otherwise" in pair.sentence
    low, high = wilson_interval(15, 30)
    assert (found.arm("baseline").accuracy.low, found.arm("baseline").accuracy.high) == pytest.approx((low, high))


def test_published_22_against_25_of_30_is_not_significant() -> None:
    found = compare_arms(table({"baseline": ["1"] * 22 + ["0"] * 8, "steered": ["1"] * 25 + ["0"] * 5}))
    pair = found.pair("baseline", "steered")
    assert (pair.verdict, pair.mcnemar_p) == (NOTHING, 0.25)
    assert "Nothing can be shown: 3 problems changed, and at least six must change" in pair.sentence
    assert "80% power" not in pair.sentence


def test_no_interval_and_no_t_test_where_all_moved_alike() -> None:
    pair = compare_arms(table({"baseline": ["00"] * 3, "steered": ["11"] * 3})).pair("baseline", "steered")
    assert pair.verdict == NOTHING
    assert (
        "+100.0 points of accuracy (no interval: all moved alike, p = .25, sign-flip test; 3 problems" in pair.sentence
    )
    assert "t test" not in pair.sentence


def test_a_small_run_claims_nothing_impossible() -> None:
    pair = compare_arms(table({"baseline": ["11", "11", "00"], "steered": ["00", "00", "00"]})).pair(
        "baseline", "steered"
    )
    assert pair.accuracy.low == -1
    assert "95% interval -100.0 to +" in pair.sentence
    assert "Nothing can be shown: 2 problems changed" in pair.sentence


def test_a_domain_has_the_interval_of_its_clusters() -> None:
    rows = [
        row(arm, f"p{i}", 0, arm == "x", cluster_id=f"c{i // 2}", domain="one")
        for arm in ("baseline", "x")
        for i in range(6)
    ]
    for arm in compare_arms(rows).arms:
        assert (arm.domains["one"].low, arm.domains["one"].high) == (arm.accuracy.low, arm.accuracy.high)
    single = [dataclasses.replace(one, domain=one.cluster_id) for one in rows]
    assert compare_arms(single).arm("x").domains["c0"].low is None


def test_equal_arms_say_that_nothing_varied() -> None:
    pair = compare_arms(table({"baseline": ["10", "01"], "steered": ["10", "01"]})).pair("baseline", "steered")
    assert pair.verdict == NOTHING
    assert "Every problem was solved equally often in both arms" in pair.sentence


def test_placebo_is_compared_with_the_baseline_and_with_the_steered_arm() -> None:
    found = compare_arms(simulated(20, 2, {"baseline": 0, "steered": 0.1, "placebo": 0}))
    assert [(pair.a, pair.b) for pair in found.pairs] == [
        ("baseline", "steered"),
        ("baseline", "placebo"),
        ("placebo", "steered"),
    ]
    assert all(pair.holm_p >= pair.p_value >= pair.accuracy.p_value for pair in found.pairs)
    assert found.notes[0].startswith("3 pairs of arms are compared")


def test_what_could_be_shown_is_found_for_all_that_is_judged_together() -> None:
    rows = simulated(40, 4, {"baseline": 0.0, "x": 0.02})
    alone, among_8 = (differences(rows, "baseline", 0.05 / num)["x"] for num in (1, 8))
    assert compare_arms(rows).pairs[0].accuracy == alone
    assert alone.detectable < among_8.detectable  # type: ignore[operator]
    three = simulated(40, 4, {"baseline": 0.0, "x": 0.02, "y": 0.0})
    first = compare_arms(three).pairs[0].accuracy.detectable
    assert first == differences(three, "baseline", 0.05 / 2)["x"].detectable


def test_tokens_of_solved_problems_are_over_clusters_too() -> None:
    """Copies of a problem in a cluster add nothing: the interval is that of one copy each."""
    random, once, copies = np.random.default_rng(0), [], []
    for number in range(12):
        for arm, size in (("baseline", 1.0), ("x", 0.7)):
            tokens = int(200 * size * np.exp(random.normal(0, 0.5)))
            once.append(row(arm, f"p{number}", 0, True, tokens))
            copies += [row(arm, f"p{number}{copy}", 0, True, tokens, cluster_id=f"c{number}") for copy in "abcd"]
    one, many = (compare_arms(rows).pairs[0].tokens_both_solved for rows in (once, copies))
    assert (many.low, many.high) == pytest.approx((one.low, one.high))
    alone = [dataclasses.replace(made, cluster_id="c") for made in copies[:8]] + [
        dataclasses.replace(made, outcome="wrong") for made in copies[8:]
    ]
    assert compare_arms(alone).pairs[0].tokens_both_solved is None, "one cluster gives no interval"


def test_clusters_widen_the_interval_when_problems_move_together() -> None:
    rows = table({"baseline": ["0"] * 12 + ["1"] * 12, "steered": ["1"] * 6 + ["0"] * 6 + ["1"] * 12})
    clustered = [dataclasses.replace(r, cluster_id=f"c{int(r.problem_id[1:]) // 6}") for r in rows]
    plain, wide = compare_arms(rows), compare_arms(clustered)
    assert wide.num_clusters == 4
    assert wide.pairs[0].accuracy.se > 1.5 * plain.pairs[0].accuracy.se
    assert wide.pairs[0].mcnemar_p is None
    assert wide.notes == ("Some problems share a cluster: standard errors and bootstrap are over clusters.",)
    unique = [dataclasses.replace(r, cluster_id=r.problem_id) for r in rows]
    assert compare_arms(unique).num_clusters is None


def test_multiplicity_note_of_a_tuned_plan() -> None:
    rows = table({"baseline": ["10", "01"], "steered": ["11", "01"]})
    clean = compare_arms(rows, tuned=Tuning(4, "60 tuning problems")).notes
    assert clean == (
        "The plan was chosen among 4 settings on 60 tuning problems, none of which is compared here: the choice needs no correction.",
    )
    assert "2 of those problems are compared here too" not in clean[0]
    shared = compare_arms(rows, tuned=Tuning(4, "60 tuning problems", num_shared=2)).notes
    assert "2 of those problems are compared here: its p-values are too small" in shared[0]


def test_multiplicity_note_of_arms_with_a_setting_each() -> None:
    rows = table({"baseline": ["10", "01"], "caa": ["11", "01"], "budget": ["11", "11"]})
    note = compare_arms(rows, tuned=Tuning(7, "60 tuning problems", num_arms=2)).notes[-1]
    assert note == (
        "2 arms were tuned, each among settings of its own (7 in all), on 60 tuning problems, none of which is compared "
        "here: the choice needs no correction."
    )
    one = compare_arms(rows, tuned=Tuning(7, "60 tuning problems", num_arms=1, num_shared=3)).notes[-1]
    assert one == (
        "1 arm was tuned, among 7 settings, on 60 tuning problems, and 3 of those problems are compared here: "
        "their p-values are too small and their effect too large."
    )


def test_unmeasured_tokens_stay_unmeasured() -> None:
    rows = [dataclasses.replace(r, thinking_tokens=None) for r in table({"baseline": ["10", "01"], "b": ["10", "11"]})]
    found = compare_arms(rows)
    assert found.arm("b").thinking_tokens is None
    assert found.pairs[0].thinking_tokens is None
    assert found.arm("b").total_tokens is not None


def test_flip_points_at_samples_that_show_it() -> None:
    def rows(pattern: str) -> list:  # type: ignore[type-arg]
        return [row("x", "p", j, letter == "1") for j, letter in enumerate(pattern)]

    assert Flip.of("p", rows("0110"), rows("0111")) == Flip("p", 0.5, 0.75, 3, 3)
    assert Flip.of("p", rows("1000"), rows("1100")) == Flip("p", 0.25, 0.5, 1, 1)
    assert Flip.of("p", rows("1101"), rows("1000")) == Flip("p", 0.75, 0.25, 1, 1)


def test_json_round_trip_is_byte_equal_and_holds_no_time() -> None:
    rows = simulated(15, 3, {"baseline": 0, "steered": 0.1, "placebo": 0})
    found = compare_arms(rows)
    text = found.to_json()
    assert compare_arms(list(rows)).to_json() == text
    again = Comparison.from_dict(json.loads(text))
    assert again.to_json() == text
    names = [[flip.problem_id for flip in one.pair("baseline", "steered").gained] for one in (again, found)]
    assert names[0] == names[1]
    floats = [value for value in _walk(json.loads(text)) if isinstance(value, float)]
    assert all(float(f"{value:.6g}") == value for value in floats)
    with pytest.raises(ValueError, match="not a comparison"):
        Comparison.from_dict({"arms": []})


def _walk(value: object) -> list[object]:
    if isinstance(value, dict):
        return [inner for one in value.values() for inner in _walk(one)]
    if isinstance(value, list):
        return [inner for one in value for inner in _walk(one)]
    return [value]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "nothing to compare"),
        (table({"a": ["1", "0"], "b": ["1", "0"]}), r"no arm is named 'baseline': the arms are \['a', 'b'\]"),
        (
            table({"baseline": ["1", "0", "1"], "steered": ["1", "0"]}),
            r"have different problems \(1 are in one only, such as 'p2'\)",
        ),
        (table({"baseline": ["11", "00"], "steered": ["11", "0"]}), "arm 'steered' has 1 samples of problem 'p1'"),
        (table({"baseline": ["11", "0"], "steered": ["11", "0"]}), "arm 'baseline' has 1 samples of problem 'p1'"),
        (table({"baseline": ["1"], "steered": ["0"]}), "needs at least 2 problems, got 1"),
        (table({"baseline": ["1", "0"]}) * 2, "sample 0 of problem 'p0', arm 'baseline', is there twice"),
        ([row("baseline", "p", 0, True), row("baseline", "q", 0, True, task="other")], "the samples are of 2 tasks"),
    ],
)
def test_unequal_arms_are_refused(rows: list, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=text) as info:
        compare_arms(rows)
    assert "\n" not in str(info.value)


def test_unknown_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no arm is named 'stered'"):
        compare_arms(table({"baseline": ["1", "0"]}), pairs=[("baseline", "stered")])


def test_a_run_without_effect_is_seldom_called_one() -> None:
    dice = random.Random(1)
    shown = sum(
        compare_arms(simulated(40, 2, {"baseline": 0, "steered": 0}, seed=dice.randrange(10**9))).pairs[0].verdict
        != NOTHING
        for _ in range(60)
    )
    assert shown <= 9  # binomial(60, .05): 99.9% quantile


def test_an_effect_needs_the_sign_flip_test_too() -> None:
    """4 problems of 240 lose one sample of four, all others tie: p = .045 by the t test, .125 by the exact sign-flip."""
    found = compare_arms(table({"baseline": ["1111"] * 240, "steered": ["1110"] * 4 + ["1111"] * 236}))
    pair = found.pair("baseline", "steered")
    assert pair.accuracy.p_value < 0.05
    assert pair.accuracy.sign_flip_p == pytest.approx(0.125)
    assert pair.verdict == NOTHING
    assert "The paired t test alone would say otherwise (p = .045); the sign-flip test does not agree" in pair.sentence


def three_arms(gains: tuple[int, int, int]) -> Comparison:
    """30 problems, one sample; each arm gains so many and loses none."""
    patterns = {"baseline": ["0"] * 30}
    patterns |= {name: ["1"] * gain + ["0"] * (30 - gain) for name, gain in zip("abc", gains, strict=True)}
    return compare_arms(table(patterns))


def test_words_follow_holm_over_the_verdicts_own_p() -> None:
    """6-0 is p = .031 alone; beside two arms without a change it is .094. The t test's p, .012, would have been shown by its Holm."""
    pair = three_arms((6, 0, 0)).pair("baseline", "a")
    assert (pair.p_value, pair.holm_p) == (0.03125, 0.09375)
    assert 3 * pair.accuracy.p_value < 0.05, "Holm over the t tests would call it an effect"
    assert pair.verdict == NOTHING
    assert "Nominally better (p = .031), not after Holm over 3 arms (p = .094)." in pair.sentence
    assert "at least seven must change to show anything after Holm over 3 arms" in pair.sentence
    alone = compare_arms(table({"baseline": ["0"] * 30, "a": ["1"] * 6 + ["0"] * 24})).pair("baseline", "a")
    assert (alone.verdict, alone.p_value, alone.holm_p) == (HELPED, 0.03125, 0.03125)
    assert "Holm" not in alone.sentence
    assert "Nominal" not in alone.sentence


def test_holm_steps_down() -> None:
    """8-0 of 3 arms is .0078 x 3 = .023; the second, 7-0, is then .0156 x 2 = .031, and the third, 6-0, .031 x 1."""
    found = three_arms((8, 7, 6))
    assert [pair.holm_p for pair in found.pairs] == pytest.approx([0.0234375, 0.03125, 0.03125])
    assert [pair.verdict for pair in found.pairs] == [HELPED] * 3
    assert "p = .008 alone, p = .023 after Holm over 3 arms, exact McNemar test" in found.pairs[0].sentence


def test_an_effect_that_is_shown_comes_with_its_exaggeration() -> None:
    pair = compare_arms(table({"baseline": ["0"] * 30, "a": ["1"] * 6 + ["0"] * 24})).pair("baseline", "a")
    assert pair.accuracy.power == pytest.approx(0.57, abs=0.12)  # P(Bin(30, .2) >= 6) = .57
    assert 1.1 < pair.accuracy.exaggeration < 1.5  # type: ignore[operator]
    assert (
        "Effects that are shown are too large on average: if the true one were +20.0 points, such a run would show it with "
        in pair.sentence
    )
    assert f"and then {pair.accuracy.exaggeration:.2f} times its size." in pair.sentence
    whole = compare_arms(table({"baseline": ["0"] * 9, "a": ["1"] * 9})).pair("baseline", "a")
    assert "p = .004, exact McNemar test; 9 problems x 1 sample)." in whole.sentence
    assert "too large on average" not in whole.sentence, "1.00 times its size is not too large"
    sure = compare_arms(simulated(200, 4, {"baseline": 0.0, "x": 0.3})).pairs[0].accuracy
    assert sure.exaggeration == pytest.approx(1, abs=0.01)


def test_five_clusters_can_show_nothing_however_large_the_effect() -> None:
    rows = table({"baseline": ["00"] * 20, "x": ["11"] * 10 + ["10"] * 10})
    rows = [dataclasses.replace(one, cluster_id=f"c{int(one.problem_id[1:]) // 4}") for one in rows]
    pair = compare_arms(rows).pairs[0]
    assert pair.accuracy.mean == 0.75
    assert pair.verdict == NOTHING
    assert "Nothing can be shown: 5 clusters changed, and at least six must change to show anything." in pair.sentence


@pytest.mark.parametrize(("cut", "said"), [(0, False), (1, False), (20, True)])
def test_truncation_that_differs_is_said_in_the_sentence(cut: int, said: bool) -> None:
    rows = table({"baseline": ["10"] * 40, "x": ["10"] * 40})
    ends = [index for index, one in enumerate(rows) if one.arm == "x"][:cut]
    rows = [dataclasses.replace(one, finish_reason="length") if i in ends else one for i, one in enumerate(rows)]
    sentence = compare_arms(rows).pairs[0].sentence
    expected = "The token limit cut 25.0% of the samples of x, 0.0% of baseline: the lengths of these are lower bounds."
    assert (expected in sentence) == said
    assert ("token limit" in sentence) == said


def test_length_verdicts_have_a_holm_of_their_own() -> None:
    """One arm of four is nominally shorter: not after Holm over the four lengths; accuracy has nothing to do with it."""
    dice = np.random.default_rng(29)
    base = dice.integers(200, 400, 30)
    rows = []
    for arm, factor in (("baseline", 1.0), ("a", 0.93), ("b", 1.0), ("c", 1.0), ("d", 1.0)):
        own = np.rint(base * factor * np.exp(dice.normal(0, 0.12, 30))).astype(int)
        rows += [row(arm, f"p{i}", 0, i % 2 == 0, int(tokens)) for i, tokens in enumerate(own)]
    four, one = compare_arms(rows), compare_arms([r for r in rows if r.arm in ("baseline", "a")])
    alone, among = one.pairs[0].length, four.pairs[0].length
    assert alone is not None
    assert among is not None
    assert alone.p_value == among.p_value == alone.holm_p < 0.05 < among.holm_p == pytest.approx(4 * among.p_value)
    assert (alone.verdict, among.verdict) == ("fewer tokens", "no change in length shown")


@pytest.mark.parametrize("samples", ["11", "10"])
def test_a_run_whose_problems_all_moved_alike_says_no_smallest_effect(samples: str) -> None:
    pair = compare_arms(table({"baseline": ["00"] * 12, "a": [samples] * 12})).pairs[0]
    assert (pair.verdict, pair.accuracy.se) == (HELPED, 0)
    assert (pair.accuracy.detectable, pair.accuracy.power) == (None, None), "0.0 points would be shown by no run"
    assert "too large" not in pair.sentence


def test_responses_that_no_grader_judges_are_said() -> None:
    rows = table({"baseline": ["1e"], "a": ["11"]})
    assert unanswered_notes(rows) == (f"baseline: 1 of 2 responses were not judged ({rows[1].reason})",)
