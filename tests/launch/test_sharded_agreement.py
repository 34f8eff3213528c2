"""What all ranks must share: the plan; and one result where a command is started on several ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from expert_stats import RoutingCounts
from launch.cli.main import main, program
from launch.core.ranks import Ranks, refuse_several_ranks, wait_seconds
from rank_processes import ROOT, run_ranks


def test_ranks_whose_plans_differ_are_refused(tmp_path: Path) -> None:
    done = run_ranks(ROOT / "tests" / "launch" / "plan_worker.py", 2, [str(tmp_path)], 90)
    assert done.codes == [0, 0], done.text[-3000:]
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for case in ("own plans", "torn on its way"):
        assert zero[case] == one[case], "every rank is told, none waits for another"
        assert zero[case].startswith("the steering plan differs on rank 1 ('")
        assert zero[case].endswith("): start all ranks alike")
    assert zero["one plan"] == one["one plan"] == ""
    assert zero["received"] == one["received"] == zero["rank 0's"]


def test_one_rank_agrees_with_itself() -> None:
    Ranks().assert_same("the steering plan", "x")
    assert Ranks().broadcast("x") == "x"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "tp_ep"])
def test_collect_on_two_ranks_writes_what_one_writes(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--num", "16", "--max-new-tokens", "40", "--out", str(tmp_path / "plain")]) == 0
    options = ["collect", "--traces", str(tmp_path / "plain"), "--markers", "<think>", "--tokens-per-batch", "256"]
    assert main([*options, "--out", str(tmp_path / "one.safetensors")]) == 0
    sharded = [*options, "--out", str(tmp_path / "two.safetensors"), "--backend", backend]
    done = run_ranks(ROOT / "launch" / "cli" / "main.py", 2, sharded, 120)
    assert done.codes == [0, 0], done.text[-3000:]
    assert done.text.count("16 traces, ") == 1, "rank 0 alone talks"
    one, two = (RoutingCounts.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.num_traces == two.num_traces == 16
    assert one.digest() == two.digest()


def test_a_rank_of_the_command_line_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["moe-steer", "--help"])
    for number, at_once in (("1", []), ("2", [0])):
        ended.clear()
        monkeypatch.setenv("WORLD_SIZE", number)
        with pytest.raises(SystemExit):
            program()
        assert ended == at_once, "several ranks: not by the interpreter's way out, which gloo's threads may abort"
    assert 'moe-steer = "launch.cli.main:program"\n' in (ROOT / "pyproject.toml").read_text()


def test_what_is_one_process_is_refused_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_several_ranks("moe-steer generate", "launch/evaluate.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="generate is one process, and this is one of 2 ranks: start it without"):
        refuse_several_ranks("moe-steer generate", "launch/evaluate.py")


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan"])
def test_the_patience_is_a_positive_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_STEER_WAIT_SECONDS", given)
    with pytest.raises(ValueError, match=f"MOE_STEER_WAIT_SECONDS is '{given}': give a positive number"):
        wait_seconds()
