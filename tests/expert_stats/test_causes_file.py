"""Statistics over problems, the causes file, and what a plan takes from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from expert_stats.causes import Causes, Reading, right_against_wrong, select_causes, text_loss, token_odds
from expert_stats.causes.causal_audit import LEAST_SPLIT, _greedy, split_problems
from expert_stats.causes.over_problems import agreement, mean_effect, sign_flip, t_test
from moe_steer.tokens import Trace

MODEL = {
    "model_type": "deepseek_v3", "num_layers": 4, "num_experts": 8, "top_k": 2, "moe_layers": [1, 2, 3], "hidden_size": 8,
    "name": "x",
}  # fmt: skip


def causes(num: int = 30, effect: float = 1.0, wanted: str = "higher", seed: int = 0) -> Causes:
    """Noise, but for (1, 0) which raises, (2, 3) which lowers, (3, 7) which writes nothing and (3, 6) which nothing selects."""
    rng = np.random.default_rng(seed)
    gradient_PLE = rng.normal(size=(num, 3, 8)) * 0.5
    gradient_PLE[:, 0, 0] += effect
    gradient_PLE[:, 1, 3] -= effect
    gradient_PLE[:, 2, 6:] = 0
    selected_LE = np.full((3, 8), 9)
    selected_LE[2, 6] = 0
    return Causes(
        model=MODEL, outcome={"kind": "tokens"}, wanted=wanted, problems=tuple(f"p{n}" for n in range(num)),
        value_P=rng.normal(size=num), gradient_PLE=gradient_PLE, selected_LE=selected_LE,
    )  # fmt: skip


def test_tables_are_those_of_a_t_test_cell_by_cell() -> None:
    found = causes()
    tables = found.tables()
    for at in ((0, 0), (1, 3), (2, 1)):
        column_P = found.gradient_PLE[(slice(None), *at)]
        test = stats.ttest_1samp(column_P, 0.0)
        low, high = test.confidence_interval()
        got = [tables[name][at] for name in ("gradient_LE", "low_LE", "high_LE", "p_LE")]
        np.testing.assert_allclose(got, [column_P.mean(), low, high, test.pvalue], rtol=1e-9)
    assert np.isnan(tables["p_LE"][2, 6]), "what no token selected is not tested"
    assert tables["p_LE"][2, 7] == 1
    defined = np.isfinite(tables["p_LE"])
    np.testing.assert_allclose(tables["q_LE"][defined], stats.false_discovery_control(tables["p_LE"][defined]))


def test_the_interval_of_the_best_of_many_covers_it() -> None:
    """Nothing raises or lowers anything: the best is where luck is greatest, and its own interval lies above 0 in most runs."""
    ours, own, runs = 0, 0, 60
    for seed in range(runs):
        found = causes(num=15, effect=0.0, seed=seed)
        best = found.ranking()[0]
        low, high = found.of_the_best(best)
        ours += low <= 0 <= high
        own += best.low <= 0 <= best.high
    assert ours >= 0.95 * runs - 2 * np.sqrt(0.05 * 0.95 * runs)
    assert own < 0.8 * runs


def test_verdicts_and_ranking() -> None:
    rows = causes().ranking()
    assert len(rows) == 23
    assert (rows[0].layer, rows[0].expert, rows[0].verdict) == (1, 0, "raises")
    assert (rows[-1].layer, rows[-1].expert, rows[-1].verdict) == (2, 3, "lowers")
    words = {(row.layer, row.expert): row.verdict for row in rows}
    assert words[3, 7] == "inert"
    assert sum(word == "not shown" for word in words.values()) >= 18


def test_noise_is_called_a_cause_no_more_often_than_asked() -> None:
    runs = [
        sum(row.verdict in ("raises", "lowers") for row in causes(effect=0.0, seed=seed).ranking())
        for seed in range(400)
    ]
    false = np.mean(np.array(runs) > 0)
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert false > 0.005, "the level is used"


def test_an_effect_over_problems_needs_six_that_changed() -> None:
    assert sign_flip(np.ones(5)) == pytest.approx(2 / 2**5)
    assert mean_effect(np.full(5, 1.0) + np.arange(5) * 1e-6).p > 0.05
    assert mean_effect(np.full(6, 1.0) + np.arange(6) * 1e-6).p < 0.05
    assert mean_effect(np.zeros(8)).p == 1.0
    signs = [[1 if pattern >> bit & 1 else -1 for bit in range(8)] for pattern in range(256)]
    values = np.random.default_rng(1).normal(size=8) + 0.5
    brute = np.mean([abs(np.mean(values * np.array(sign))) >= abs(values.mean()) - 1e-12 for sign in signs])
    assert sign_flip(values) == pytest.approx(brute)
    assert float(t_test(np.array(1.0), np.array(np.nan), 1)) != float(t_test(np.array(1.0), np.array(0.5), 9))


def test_the_interval_of_the_agreement_covers_and_is_not_drawn_to_zero() -> None:
    """True correlation of the derivative's expectation with the score, over fresh problems."""
    rng = np.random.default_rng(0)
    truth_N = rng.normal(size=60)
    other_LE = (truth_N + rng.normal(size=60)).reshape(3, 20)
    used_LE = np.ones((3, 20), dtype=bool)
    many = truth_N + rng.normal(size=(4000, 60)) * 2
    limit = []
    for start in range(0, 2400, 40):
        found = agreement(many[start : start + 40].reshape(40, 3, 20), other_LE, used_LE, resamples=80)
        limit.append((found.spearman, found.low, found.high))
    centre = np.mean([value for value, _, _ in limit])
    covered = np.mean([low <= centre <= high for _, low, high in limit])
    assert covered >= 0.86  # .93 and twice its standard error over 60 runs
    assert agreement(many[:40].reshape(40, 3, 20), -other_LE, used_LE, resamples=80).spearman < -0.4


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    from expert_stats.causes import ExactEffect

    one = ExactEffect(
        experts=((1, 0), (2, 3)), gains=(2.0, 0.0), router="free", effect=0.5, low=0.1, high=0.9, p=0.01, q=0.02,
        by_problem=(0.5, 0.5),
    )  # fmt: skip
    whole = dataclasses.replace(causes(), effects=(one,), coalition=(one, one), tested_on=("p1", "p2"))
    whole.save(tmp_path / "c.json")
    back = Causes.load(tmp_path / "c.json")
    np.testing.assert_array_equal(back.gradient_PLE, whole.gradient_PLE.astype(np.float32))
    np.testing.assert_array_equal(back.selected_LE, whole.selected_LE)
    np.testing.assert_array_equal(back.value_P, whole.value_P)
    assert (back.effects, back.coalition, back.tested_on) == (whole.effects, whole.coalition, whole.tested_on)
    assert json.loads((tmp_path / "c.json").read_text())["tables"]["p_LE"][2][6] is None
    for wrong in ('{"kind": "causes"}', '{"kind": "scores", "version": 1}', "[]", "{", '{"kind": 3}'):
        (tmp_path / "w.json").write_text(wrong)
        with pytest.raises(ValueError, match="w.json"):
            Causes.load(tmp_path / "w.json")
    data = json.loads((tmp_path / "c.json").read_text())
    for key, value in (("gradient", "AAAA"), ("selected", [[1]]), ("version", 2), ("effects", [{}])):
        (tmp_path / "w.json").write_text(json.dumps({**data, key: value}))
        with pytest.raises(ValueError, match=r"w\.json.*moe-steer causes"):
            Causes.load(tmp_path / "w.json")


@pytest.mark.parametrize(
    ("wanted", "gain", "expert"),
    [("higher", 8.0, (1, 0)), ("higher", 0.0, (2, 3)), ("lower", 8.0, (2, 3)), ("lower", 0.5, (1, 0))],
)
def test_a_plan_moves_the_outcome_where_it_is_wanted(wanted: str, gain: float, expert: tuple[int, int]) -> None:
    plan = select_causes(causes(wanted=wanted), 1, gain)
    assert [(entry.layer, entry.expert, entry.gain) for entry in plan.experts] == [(*expert, gain)]


def test_a_plan_of_what_is_not_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="only 1 experts are shown to raise"):
        select_causes(causes(), 2, 8.0)
    assert len(select_causes(causes(), 2, 8.0, max_q=1.0).experts) == 2, "the level is the caller's"
    with pytest.raises(ValueError, match="changes nothing"):
        select_causes(causes(), 1, 1.0)
    with pytest.raises(ValueError, match="whole number"):
        select_causes(causes(), 0, 2.0)


def test_problems_are_split_and_a_coalition_grows_while_it_helps() -> None:
    choosing, tested = split_problems(LEAST_SPLIT)
    assert not set(choosing) & set(tested)
    assert len(choosing) == len(tested) == 6
    assert split_problems(LEAST_SPLIT - 1)[0] == split_problems(LEAST_SPLIT - 1)[1]
    worth = {(1, 0): 1.0, (1, 1): 0.6, (2, 3): 0.8}
    single: list[Any] = [((1, 0), 2.0), ((1, 1), 2.0), ((2, 3), 0.0), ((3, 3), 0.0)]

    def change_of(plans: Any) -> Any:
        """(1, 0) and (2, 3) do the same thing: together they are worth little more than one."""
        totals = []
        for plan in plans[1:]:
            taken = {(entry.layer, entry.expert) for entry in plan.experts}
            total = sum(worth[one] for one in taken) - (0.7 if {(1, 0), (2, 3)} <= taken else 0.0)
            totals.append(total)
        return np.array(totals)

    steps = _greedy(single, np.array([1.0, 0.6, 0.8, -0.5]), "higher", 3, change_of)
    assert [[one[0] for one in step] for step in steps] == [[(1, 0)], [(1, 0), (1, 1)], [(1, 0), (1, 1), (2, 3)]]
    assert _greedy(single, np.array([1.0, 0.6, 0.8, -0.5]), "lower", 3, lambda plans: -np.ones(len(plans) - 1))[0][0][
        0
    ] == (3, 3)


def trace(name: str, ids: range, prompt: int = 2) -> Trace:
    return Trace(name, tuple(ids), prompt)


def test_right_against_wrong_weighs_the_sides_of_each_problem_alike() -> None:
    right = [trace("a#0", range(1, 7)), trace("a#1", range(1, 6)), trace("c#0", range(1, 6))]
    wrong = [trace("a#2", range(1, 9)), trace("b#0", range(1, 9))]
    found = right_against_wrong(right, wrong)
    assert {(one.name, one.weight) for one in found} == {
        ("a#0 (right)", 0.5),
        ("a#1 (right)", 0.5),
        ("a#2 (wrong)", -1.0),
    }
    assert found[0].at == (1, 2, 3, 4)
    assert found[0].tokens == ((3,), (4,), (5,), (6,))
    with pytest.raises(ValueError, match="both a right and a wrong"):
        right_against_wrong(right[2:], wrong)


def test_token_odds_and_losses() -> None:
    found = token_odds(
        [trace("a#0", range(9)), trace("a#1", range(9)), trace("b", range(9))], {"a#0": [3, 5], "b": [2]}, [7, 8, 7]
    )
    assert [(one.problem, one.at, one.weight) for one in found] == [("a", (3, 5), 0.5), ("b", (2,), 1.0)]
    assert found[0].tokens == ((7, 8), (7, 8))
    with pytest.raises(ValueError, match="no decision point"):
        token_odds([trace("a#0", range(9))], {}, [7])
    (one,) = text_loss({"t": [4, 5, 6]})
    assert (one.weight, one.at, one.odds) == (-0.5, (0, 1), False)
    with pytest.raises(ValueError, match="at least 2"):
        text_loss({"t": [4]})
    with pytest.raises(ValueError, match="ascending places"):
        Reading(name="x", problem="x", token_ids=(1, 2), at=(2,), tokens=((1,),), odds=True, weight=1.0)
    with pytest.raises(ValueError, match="as many token sets"):
        Reading(name="x", problem="x", token_ids=(1, 2), at=(0, 1), tokens=((1,), (1, 2)), odds=True, weight=1.0)
