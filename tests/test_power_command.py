"""``moe-steer power`` and ``moe-steer export`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import COMMANDS, main
from reasoning_evals.comparing.power import (
    Assumptions,
    assume_from_baseline,
    assume_from_pair,
    plan_power,
    power,
    sampling_noise,
    variance_parts,
)
from reasoning_evals.comparing.statistics import detectable_effect
from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.runs.run import run_arms
from scripted_sampler import arms, problems


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
    assert "noise, E p(1-p) of both arms: 0.200 (as given)" in shown
    found = json.loads(out.read_text())
    by_samples = dict(zip(found["samples"], found["needed"], strict=True))
    assert [by_samples[k] for k in (1, 8, 16, 64)] == [[660], [110], [71], [42]]
    assert found["problems"] == [30, 60, 198, 500]
    assert found["samples_needed"][0][0] is None, "30 problems are too few at any number of samples"
    assert "never" in shown


def test_power_is_that_of_the_table_for_aime(tmp_path: Path) -> None:
    """E p(1-p) .105 an arm, w .10, an effect of 5 points, normal approximation: a table worked out elsewhere."""
    out = tmp_path / "power.json"
    options = ["--points", "5", "--samples", "8", "16", "32", "64", "--problems", "30", "60", "198"]
    assert main(["power", "--noise", "0.105", *options, "--out", str(out)]) == 0
    chances = json.loads(out.read_text())["power"][0]
    assert [[round(chance, 2) for chance in row] for row in chances] == [
        [0.30, 0.53, 0.96],
        [0.44, 0.72, 1.00],
        [0.57, 0.85, 1.00],
        [0.66, 0.92, 1.00],
    ]


def test_from_a_baseline_run(run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "power.json"
    assert main(["power", "--baseline", str(run_folder), "--samples", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "baseline: 20 problems x 4 samples, " in shown
    assert "measured on the baseline; the other arm taken alike" in shown
    found = json.loads(out.read_text())
    assert found["problems"] == [20]
    points = f"{100 * found['detectable'][0][0]:.1f} points"
    assert f"a comparison of this run's size (20 problems x 4) shows an effect of {points} with 80% power" in shown
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
        (["--noise", "0.1", "--effect-sd", "10"], "effect_sd must be in [0, 1], got 10"),
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
    assert found.effect_sd**2 == pytest.approx(variance_parts(a, b).effect_variance)
    assert found.noise == pytest.approx(variance_parts(a, b).noise_a)
    same = assume_from_pair(a, a)
    assert same.effect_sd == 0
    assert "at or below 0" in same.effect_sd_source


def test_the_tables_agree_with_each_other() -> None:
    given = Assumptions(noise=0.2, effect_sd=0.1, noise_source="", effect_sd_source="")
    plan = plan_power(given, problems=(40, 110))
    for j, effect in enumerate(plan.effects):
        for i, k in enumerate(plan.samples):
            n = plan.needed[i][j]
            assert power(effect, n, k, 0.01, 0.2) >= 0.8
            assert n == 2 or power(effect, n - 1, k, 0.01, 0.2) < 0.8
    assert plan.detectable[2][1] == pytest.approx(detectable_effect(((0.01 + 0.2 / 8) / 110) ** 0.5, 109))
    assert plan.samples_needed[1][1] == 8
    assert plan.power[1][2][1] == pytest.approx(0.8, abs=0.01)


def test_export_from_the_command_line(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "--out", str(tmp_path / "run.parquet")]) == 0
    assert (tmp_path / "run.parquet").stat().st_size > 1000
    assert main(["export", str(run_folder), "--format", "lm-eval", "--out", str(tmp_path / "lm")]) == 0
    assert len(list((tmp_path / "lm").rglob("*.json*"))) == 4
    assert capsys.readouterr().out.count("wrote ") == 5
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "is not a run folder" in capsys.readouterr().err
