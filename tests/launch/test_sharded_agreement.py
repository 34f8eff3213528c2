"""What all ranks must share: the plan; and one result where a command is started on several ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from expert_stats import RoutingCounts, Trace, write_traces
from expert_stats.rivals import Measures
from launch.cli.main import main, program
from launch.core.ranks import Ranks, refuse_several_ranks, wait_seconds
from launch.core.wiring import read_any_traces
from moe_steer import load_model
from rank_processes import ROOT, run_ranks

pytestmark = pytest.mark.slow


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


def test_collect_and_measure_on_two_ranks_write_what_one_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``measure``: rank by rank where each holds the model, together where they share it; one file at the end."""
    assert main(["generate", "--num", "16", "--max-new-tokens", "40", "--out", str(tmp_path / "plain")]) == 0
    traces = read_any_traces([str(tmp_path / "plain")], load_model("lab")[1])
    few = sorted(traces, key=lambda trace: trace.prompt_length)[:3]
    short = [Trace(one.trace_id, one.token_ids[: one.prompt_length + 4], one.prompt_length) for one in few]
    write_traces(tmp_path / "few.jsonl", short)
    collect = ["collect", "--traces", str(tmp_path / "plain"), "--markers", "<think>", "--tokens-per-batch", "256"]
    measure = ["measure", "lab", "--traces", str(tmp_path / "few.jsonl"), "--tokens-per-batch", "64"]
    whole = [*measure, "--of", "weights", "outputs", "divergence"]
    apart = [
        *measure,
        "--of",
        "weights",
    ]  # of experts that no rank holds whole; a pass for each of them would take minutes
    assert main([*collect, "--out", str(tmp_path / "one.safetensors")]) == 0
    assert main([*whole, "--out", str(tmp_path / "measured.safetensors")]) == 0
    told = capsys.readouterr().out
    commands = {"plain": whole, "zero3": apart, "autoep": apart, "tp_ep": [*apart, "divergence"]}
    lines = [
        [*words, "--backend", name, "--out", str(tmp_path / f"{name}.safetensors")] for name, words in commands.items()
    ]
    lines += [[*collect, "--backend", name, "--out", str(tmp_path / f"{name}.counts")] for name in ("auto", "tp_ep")]
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    done = run_ranks(ROOT / "tests" / "launch" / "commands_worker.py", 2, [str(tmp_path / "commands.json")], 240)
    assert done.codes == [0, 0], done.text[-3000:]
    assert done.text.count("16 traces, ") == 2, "rank 0 alone talks"
    assert "weights, outputs, divergence of experts over 3 problems, 12 response tokens" in told
    assert done.text.count(" of experts over 3 problems, 12 response tokens") == 4
    counts = [RoutingCounts.load(tmp_path / name) for name in ("one.safetensors", "auto.counts", "tp_ep.counts")]
    assert {one.num_traces for one in counts} == {16}
    assert len({one.digest() for one in counts}) == 1
    one = Measures.load(tmp_path / "measured.safetensors")
    for name, words in commands.items():
        two = Measures.load(tmp_path / f"{name}.safetensors")
        assert (two.problems, two.families, set(two.sums)) == (one.problems, one.families, set(words) & set(one.sums))
        np.testing.assert_array_equal(two.tokens_P, one.tokens_P, err_msg=name)
        np.testing.assert_array_equal(two.selected_PLE, one.selected_PLE, err_msg=name)
        for what, table_PLE in two.sums.items():
            np.testing.assert_allclose(table_PLE, one.sums[what], rtol=1e-4, atol=1e-5, err_msg=f"{name}: {what}")


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
