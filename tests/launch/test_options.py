import dataclasses
import json

import pytest

from launch.cli.main import main as command_line
from launch.core.option_checks import refuse_idle
from launch.core.options import options_from
from launch.jobs.experts_options import Options
from launch.safety import main as safety
from launch.steer_r1 import main


def test_defaults() -> None:
    options = Options()
    assert (options.folder, options.num_samples, options.token_limit, options.size("test")) == (
        "runs/lab-search",
        4,
        440,
        240,
    )
    quick = Options(quick=True, greedy=True)
    assert (quick.folder, quick.num_samples, quick.size("test")) == ("runs/lab-search-quick-greedy", 1, 32)
    plain = Options(model="lab-plain")
    assert (plain.folder, plain.problems, plain.token_limit) == ("runs/lab-plain", "lab", 256)
    dense = Options(model="lab-dense", plan="p.json")
    assert (dense.folder, dense.token_limit, dense.rows) == ("runs/lab-dense", 384, 256)
    real = Options(model="deepseek-ai/DeepSeek-R1", problems="aime2024", preset="rice-r1-math", samples=16)
    assert (real.folder, real.num_samples, real.token_limit, real.size("test")) == ("runs/DeepSeek-R1", 16, 32768, None)


def test_where_it_is_written_is_not_part_of_the_config() -> None:
    assert Options(out="a", name="b", local_rank=1).config() == Options().config()
    assert Options(seed=1).config() != Options().config()


@pytest.mark.parametrize(
    ("idle", "message"),
    [
        ({"plan": "p.json", "top": 5}, "--top is for experts that are searched, and --plan gives them: leave it out"),
        ({"plan": "p.json", "gains": (3.0,)}, "--gains is for experts that are searched, and --plan gives them"),
        ({"preset": "rice-r1-math", "num_tuning": 7}, "--num-tuning is for experts that are searched, and --preset"),
        ({"preset": "rice-r1-math", "gains": (3.0, 5.0)}, "a preset takes one, nothing is tuned"),
        ({"greedy": True, "temperature": 0.9}, "--temperature 0.9 would change nothing"),
        ({"data_dir": "here"}, "--data-dir here is for a task, and the lab makes its problems up"),
    ],
)
def test_options_that_nothing_would_follow_are_refused_when_asked(idle: dict, message: str) -> None:
    options = Options(**idle)  # as a finished run's are read back
    with pytest.raises(ValueError, match=message):
        refuse_idle(options)


def test_a_dry_run_refuses_what_the_start_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--greedy", "--temperature", "0.9", "--dry-run"])
    assert caught.value.code == 2
    assert "steer_r1.py: --temperature 0.9 would change nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plan": "p.json", "preset": "rice-r1-math"}, "give --plan or --preset, not both"),
        ({"gains": ()}, "gains is empty"),
        ({"gains": (4.0, 1.0)}, r"gains are \[4.0, 1.0\]: give numbers >= 0 other than 1"),
        ({"gains": (float("nan"),)}, "give numbers >= 0 other than 1"),
        ({"gains": (4.0, 4.0)}, "hold a number twice"),
        ({"num_test": 1}, "num_test is 1: give at least 2, a comparison needs them"),
        ({"temperature": float("inf")}, "temperature must be a positive number, got inf: for the argmax use greedy"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0: 1 keeps every token"),
        ({"samples": 0}, "samples is 0: give a whole number >= 1"),
        ({"greedy": True, "samples": 4}, "leave --samples 4 out"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_stored_options_read_back() -> None:
    options = Options(gains=(2.0, 8.0), markers=("<think>", "</think>"), seed=3)
    stored = json.loads(json.dumps(options.config())) | {"given_plan": None}
    assert (stored["temperature"], stored["top_p"]) == (0.6, 0.95), "the numbers that were taken"
    read = options_from(stored, Options, ["given_plan"])
    assert read == dataclasses.replace(options, temperature=0.6, top_p=0.95)
    assert read.config() == options.config()
    with pytest.raises(ValueError, match="setting 'given_plan', which this version does not know: use the one it had"):
        options_from(stored, Options, [])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (["compare", "--baseline", "a", "--arm", "b"], "--arm", "--arm-folder"),
        (["thinking", "a", "--arm", "b"], "--arm", "--arm-folder"),
        (["thinking", "a", "--baseline", "b"], "--baseline", "--baseline-arm"),
        (["generate", "--out", "a", "--arm=b"], "--arm", "--arm-name"),
        (["direction", "--method", "caa", "all_atoms"], "--method all_atoms", "sae"),
        (["direction", "--method", "single_atom"], "--method single_atom", "atom"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(
    command: list[str], old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line(command)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"moe-steer {command[0]}: {old} is now called {new}\n"


def test_the_old_name_of_the_baseline_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        safety(["--model", "m", "--arms", "vanilla", "caa"])
    assert capsys.readouterr().err == "safety.py: --arms vanilla is now called baseline\n"
