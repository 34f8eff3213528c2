"""``moe-steer power`` and ``moe-steer export`` as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from launch.cli.main import COMMANDS, main
from reasoning_evals.comparing.detection import planned_decision
from reasoning_evals.comparing.power import (
    Assumptions,
    Planned,
    assume_from_baseline,
    assume_from_pair,
    plan_power,
    sampling_noise,
    variance_parts,
)
from reasoning_evals.comparing.statistics import paired_difference
from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.runs.run import run_arms
from scripted_sampler import arms, problems
from verdict_worlds import found, own_p


@pytest.fixture(autouse=True)
def both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "power", "launch.cli.comparing:Power")
    monkeypatch.setitem(COMMANDS, "export", "launch.cli.reading:Export")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("power") / "run"
    run_arms(arms(), problems(20), folder, 4, SamplingConfig(), seed=7, task="demo")
    return folder


def test_published_sizes_from_given_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "power.json"
    assert main(["power", "--noise", "0.1", "--points", "5", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "noise, variance of a difference of two samples: 0.200 (as given)" in shown
    found = json.loads(out.read_text())
    by_samples = dict(zip(found["samples"], found["needed"], strict=True))
    # The normal approximation says 660, 110, 71, 42; the exact McNemar test needs more, t and sign flip with few samples a little.
    assert 680 <= by_samples[1][0] <= 700
    assert [by_samples[k][0] for k in (8, 16, 64)] == pytest.approx([115, 74, 45], abs=3)
    assert found["problems"] == [30, 60, 198, 500]
    assert found["samples_needed"][0][0] is None, "30 problems are too few at any number of samples"
    assert "never" in shown


def test_power_is_that_of_the_table_for_aime(tmp_path: Path) -> None:
    """E p(1-p) .105 an arm, w .10, an effect of 5 points: a table worked out elsewhere, for the normal approximation."""
    out = tmp_path / "power.json"
    options = ["--points", "5", "--samples", "8", "16", "32", "64", "--problems", "30", "60", "198"]
    assert main(["power", "--noise", "0.105", *options, "--out", str(out)]) == 0
    chances = json.loads(out.read_text())["power"][0]
    table = [[0.30, 0.53, 0.96], [0.44, 0.72, 1.00], [0.57, 0.85, 1.00], [0.66, 0.92, 1.00]]
    for ours, normal in zip(chances, table, strict=True):
        gap = np.subtract(normal, ours)
        assert gap[0] > 0, "30 problems: the verdict needs more than a normal test"
        assert (gap > -0.03).all()
        assert (gap < 0.06).all()


@pytest.mark.parametrize(("n", "k"), [(30, 4), (30, 8)])
def test_a_plan_says_how_often_such_runs_show_the_effect(n: int, k: int) -> None:
    """Sums of few samples take few values, and the sign-flip test counts the one that was seen: without that a plan promises too much."""
    random, runs, effect = np.random.default_rng(0), 3000, 0.05
    before = random.choice([0.25, 0.75], (runs, n))
    after = before + effect + random.choice([-0.1, 0.1], (runs, n))
    noise = float((before * (1 - before)).mean() + (after * (1 - after)).mean())
    given = Assumptions(noise=noise, effect_variance=0.01, noise_source="", effect_source="")
    a, b = random.binomial(k, before) / k, random.binomial(k, after) / k
    shown = sum(own_p(found(x, y, k), x, y, k) < 0.05 and y.mean() > x.mean() for x, y in zip(a, b, strict=True)) / runs
    without = planned_decision(n, 1.0, 0.05, given.variance(k), math.inf)(effect).power
    assert Planned(given, k, 0.05, 0.8).power(effect, n) == pytest.approx(shown, abs=0.02)
    assert without > shown + 0.02


def test_from_a_baseline_run(run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "power.json"
    assert main(["power", "--baseline", str(run_folder), "--samples", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "baseline: 20 problems x 4 samples, " in shown
    assert "measured on the baseline; the other arm taken alike, and equal seeds to bring nothing" in shown
    found = json.loads(out.read_text())
    assert found["problems"] == [20]
    effect = found["detectable"][0][0]
    assert (
        f"a comparison of this run's size (20 problems x 4) shows an effect of {100 * effect:.1f} points with 80% power"
        in shown
    )
    assert main(["power", "--baseline", str(run_folder), "--arm", "steered"]) == 0
    assert "measured on both arms" in capsys.readouterr().out
    other = ["--arm", "steered", "--arm-folder", str(run_folder)]
    assert main(["power", "--baseline", str(run_folder), *other]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --baseline RUN or --noise E"),
        (["--noise", "0.5"], "--noise must be in [0, 0.25], got 0.5"),
        (["--noise", "0.1", "--arm", "x"], "--arm and --arm-folder need --baseline"),
        (["--noise", "0.1", "--points", "0"], "effects must be shares in (0, 1]"),
        (["--noise", "0.1", "--problems", "1"], "expected samples >= 1 and problems >= 2"),
        (["--noise", "0.1", "--power", "0.01"], "expected 0 < alpha < power < 1"),
        (["--noise", "0.1", "--num-arms", "0"], "expected one arm or more beside the baseline, got 0"),
        (["--noise", "0.1", "--effect-sd", "10"], "--effect-sd must be in [0, 1], got 10"),
        (["--baseline", "RUN", "--baseline-arm", "x"], "no arm is named 'x': the arms are ['baseline', 'steered']"),
        (["--baseline", "RUN", "--arm-folder", "RUN"], "--arm-folder needs --arm"),
        (["--baseline", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    options: list[str], message: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["power", *[str(run_folder) if option == "RUN" else option for option in options]]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_noise_from_one_sample_is_an_upper_bound() -> None:
    table = [[1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    whole = assume_from_baseline(table)
    assert whole.noise == pytest.approx(2 * sampling_noise(table))
    single = assume_from_baseline([[value] for row in table for value in row])
    assert single.noise == pytest.approx(2 * (8 / 12) * (4 / 12))
    assert single.noise >= whole.noise
    assert "upper bound" in single.noise_source


def test_two_arms_give_the_spread_and_say_when_it_vanishes() -> None:
    a, b = [[1, 0, 0, 0]] * 3 + [[1, 1, 1, 0]] * 3, [[1, 1, 1, 1]] * 3 + [[0, 0, 0, 0]] * 3
    found = assume_from_pair(a, b)
    assert found.effect_variance == pytest.approx(variance_parts(a, b).effect_variance)
    assert found.noise == pytest.approx(variance_parts(a, b).noise_a)
    assert (found.changed, found.measured_k) == (1, 4)
    same = assume_from_pair(a, a)
    assert same.noise == 0, "equal samples have no noise between them"
    assert "no spread beyond the noise was seen" in same.effect_source


@pytest.mark.parametrize("same", [0.0, 0.5, 0.9])
def test_a_plan_from_a_pair_is_what_its_comparison_says(same: float) -> None:
    """Arms with equal seeds write the same in a share of the samples. As independent arms, 90% equal samples would be planned with
    three times the effect (F7); the covariance of equal sample numbers, and the variance of the differences, know it."""
    random = np.random.default_rng(5)
    n, k = 150, 4
    rates = random.beta(2, 2, (n, 1))
    a, fresh = random.random((n, k)) < rates, random.random((n, k)) < rates
    b = np.where(random.random((n, k)) < same, a, fresh)
    found = paired_difference(a.mean(1), b.mean(1), None, k, limit=1.0, level=0.05)
    given = assume_from_pair(a, b)
    assert given.variance(k) == pytest.approx(n * found.se**2)
    planned = Planned(given, k, 0.05, 0.8).detectable(n)
    assert planned == pytest.approx(found.detectable, rel=0.1)
    parts = variance_parts(a, b)
    independent = Assumptions(
        noise=min(1.0, parts.noise_a + parts.noise_b),
        effect_variance=max(0.0, parts.effect_variance - 2 * parts.covariance / k),
        noise_source="",
        effect_source="",
    )
    factor = Planned(independent, k, 0.05, 0.8).detectable(n) / planned  # type: ignore[operator]
    assert {0.0: 0.9, 0.5: 1.2, 0.9: 2.5}[same] < factor < {0.0: 1.1, 0.5: 1.5, 0.9: 4.0}[same]


def test_more_samples_than_measured_never_make_a_variance_negative() -> None:
    given = Assumptions(noise=0.2, effect_variance=-0.02, noise_source="", effect_source="", measured_k=4)
    assert [given.variance(k) for k in (1, 4, 8, 40)] == pytest.approx([0.18, 0.03, 0.015, 0.003])
    assert [given.samples_for(given.variance(k)) for k in (1, 4, 8, 40)] == [1, 4, 8, 40]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1, 1], [1, 1]], "every sample of the baseline is right"),
        ([[0, 0], [0, 0]], "every sample of the baseline is wrong"),
        ([[0], [0], [0]], "every sample of the baseline is wrong"),
        ([[0, 1, 1]], "the baseline has one problem"),
        ([[1, 1], [0, 0]], "all 2 samples of each problem of the baseline have one verdict"),
        ([], "the baseline holds no samples"),
        ([[], []], "the baseline holds no samples"),
    ],
)
def test_a_degenerate_baseline_says_what_cannot_be_planned(table: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assume_from_baseline(table)
    with pytest.raises(ValueError, match=message):
        assume_from_pair(table, [[1, 0]] * max(len(table), 2))
    assert assume_from_baseline([[1], [0]]).noise == pytest.approx(0.5), "one sample a problem: the upper bound"


def test_where_too_few_problems_may_change_no_effect_is_large_enough() -> None:
    """Of 60 problems 6 change on average, and six are needed: often fewer do, however large the effect is. The search ends."""
    a_PK = np.tile([1.0, 1.0, 1.0, 0.0], (20, 1))
    b_PK = a_PK.copy()
    b_PK[:2] = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    given = assume_from_pair(a_PK, b_PK)
    assert given.changed == 0.1
    plan = plan_power(given, effects=[0.05], samples=[4], problems=[60, 200])
    assert plan.detectable[0][0] is None
    assert plan.detectable[0][1] is not None


def test_the_tables_agree_with_each_other() -> None:
    given = Assumptions(noise=0.2, effect_variance=0.01, noise_source="", effect_source="")
    plan = plan_power(given, problems=(40, 110), samples=(1, 8, 16))
    for i, k in enumerate(plan.samples):
        one = Planned(given, k, 0.05, 0.8)
        for j, effect in enumerate(plan.effects):
            assert one.power(effect, plan.needed[i][j]) == pytest.approx(0.8, abs=0.03)
        for j, n in enumerate(plan.problems):
            assert one.power(plan.detectable[i][j], n) == pytest.approx(0.8, abs=0.02)  # type: ignore[arg-type]
    assert plan.samples_needed[1][1] == pytest.approx(8, abs=1)
    t = stats.t.ppf([0.975, 0.8], 109).sum()
    assert plan.detectable[1][1] == pytest.approx(t * ((0.01 + 0.2 / 8) / 110) ** 0.5, rel=0.03)


def test_several_arms_need_more_and_five_problems_show_nothing() -> None:
    given = Assumptions(noise=0.2, effect_variance=0.01, noise_source="", effect_source="")
    one = plan_power(given, samples=(1, 8), problems=(5, 60))
    eight = plan_power(given, samples=(1, 8), problems=(5, 60), num_arms=8)
    assert [row[0] for row in one.detectable] == [None, None]
    assert eight.alpha == 0.05 / 8
    for alone, among in zip(one.detectable, eight.detectable, strict=True):
        assert among[1] > 1.2 * alone[1]  # type: ignore[operator]
    assert all(
        a > b for row_a, row_b in zip(eight.needed, one.needed, strict=True) for a, b in zip(row_a, row_b, strict=True)
    )


def test_export_from_the_command_line(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "--out", str(tmp_path / "run.parquet")]) == 0
    assert (tmp_path / "run.parquet").stat().st_size > 1000
    assert main(["export", str(run_folder), "--format", "lm-eval", "--out", str(tmp_path / "lm")]) == 0
    assert len(list((tmp_path / "lm").rglob("*.json*"))) == 4
    assert capsys.readouterr().out.count("wrote ") == 5
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_problems_that_share_a_cluster_are_not_counted_as_a_run_of_this_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, of in {"own": 1, "shared": 5}.items():
        asked = [dataclasses.replace(one, cluster_id=f"c{place // of}") for place, one in enumerate(problems(20))]
        run_arms(arms(), asked, tmp_path / name, 2, SamplingConfig(), seed=7, task="demo")
        assert main(["power", "--baseline", str(tmp_path / name)]) == 0
        shown = capsys.readouterr().out
        assert ("a comparison of this run's size" in shown) == (name == "own")
        assert ("NOTE: the 20 problems lie in 4 clusters" in shown) == (name == "shared")


@pytest.mark.parametrize(
    ("noise", "effect_sd", "effect"),
    [
        (0.0, 0.02, 0.01),
        (0.0, 0.02, 0.05),
        (0.001, 0.0, 0.02),
        (0.001, 0.0, 0.1),
        (0.005, 0.01, 0.05),
        (0.1, 0.1, 0.05),
    ],
)
@pytest.mark.parametrize("k", [1, 4])
def test_the_problems_needed_have_the_power_that_was_asked_for(
    noise: float, effect_sd: float, effect: float, k: int
) -> None:
    given = Assumptions(noise=2 * noise, effect_variance=effect_sd**2, noise_source="", effect_source="")
    planned = Planned(given, k, 0.05, 0.8)
    needed = planned.problems_needed(effect)
    assert planned.power(effect, needed) >= 0.79
    if needed > 6:
        assert planned.power(effect, round(0.9 * needed)) < 0.83


def test_the_words_of_a_plan_follow_its_numbers(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["power", "--baseline", str(run_folder), "--arm", "baseline"]
    assert main(pair) == 1
    assert capsys.readouterr().err == "moe-steer: --arm baseline is the baseline itself: name another arm\n"
    shutil.copytree(run_folder, tmp_path / "again")
    assert main([*pair, "--arm-folder", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    assert "unknown" in shown
    assert "never: not one of the measured problems changed between the arms" in shown
    assert "varies too much" not in shown
    small = ["--noise", "0.1", "--problems", "4", "7", "--samples", "4"]
    for arms_at_once, least in [("1", 6), ("3", 7), ("20", 10)]:
        assert main(["power", *small, "--num-arms", arms_at_once]) == 0
        assert f"none: too few problems change for any verdict, {least} are the least" in capsys.readouterr().out
    assert main(["power", "--noise", "0", "--effect-sd", "0"]) == 1
    assert capsys.readouterr().err == (
        "moe-steer: --noise 0 and --effect-sd 0 leave nothing that varies: give one of them above 0\n"
    )


@pytest.mark.parametrize("num_problems", [2, 3, 5, 6])
def test_few_problems_of_two_arms_that_differ_by_no_more_than_noise(
    num_problems: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(3)
    shift = np.where(random.random((num_problems, 64)) < 0.5, 1, 0)
    given = assume_from_pair(shift, np.roll(shift, 1, axis=1))  # equal rates: a spread estimated below 0
    assert given.effect_variance < 0
    plan = plan_power(given, [0.02, 0.3], [1, 64], [num_problems])
    if num_problems < 6:
        assert plan.samples_needed == ((None,), (None,))
    run_arms(arms(), problems(num_problems), tmp_path / "run", 16, SamplingConfig(), seed=7, task="demo")
    assert main(["power", "--baseline", str(tmp_path / "run"), "--arm", "steered"]) in (0, 1)
    assert capsys.readouterr().err.count("\n") <= 1
