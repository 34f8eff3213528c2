"""Experts forced in and out, biased logits and another k, from ``moe-steer plan`` to ``moe-steer generate`` and its audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.main import main
from moe_steer import ExpertGain, SteeringPlan, TopK
from moe_steer.entries.audit import row_lines
from reasoning_evals.runs import read_audit

WORDS = ["--force-in", "2:3", "--force-out", "2:0", "--logit-bias", "1:4=1.5", "--top-k", "1=3@all"]


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_file, out = tmp_path / "plan.json", tmp_path / "run"
    assert main(["plan", "--out", str(plan_file), "--experts", "2:3=4", *WORDS, "--scope", "thought"]) == 0
    said = capsys.readouterr().out
    assert "layer   2 expert   3 forced in x4\n" in said
    assert "layer   2 expert   0 forced out\n" in said
    assert "layer   1 expert   4 logit +1.5\n" in said
    assert "layer   1 top 3 scope all\n" in said
    assert said.endswith("3 experts, 1 top_k, scope thought, renormalize false\n")
    plan = SteeringPlan.load(plan_file)
    assert plan.experts == (
        ExpertGain(2, 3, 4.0, force="in"),
        ExpertGain(2, 0, force="out"),
        ExpertGain(1, 4, logit_bias=1.5),
    )
    assert plan.top_k == (TopK(1, 3, "all"),)
    generate = ["generate", "--plan", str(plan_file), "--num", "4", "--max-new-tokens", "24", "--strict"]
    assert main([*generate, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    (rows,) = read_audit(out).rows.values()
    forced, forbidden, biased, number = rows
    assert forced["scoped"] == forced["selected_after"] == forced["tokens"] > forced["selected_before"]
    assert forced["weight_added"] > 0
    assert forbidden["selected_after"] == 0 < forbidden["selected_before"] == forbidden["tokens"]
    assert forbidden["scoped"] == forced["scoped"] == biased["scoped"] == biased["tokens"]
    assert biased["selected_after"] > biased["selected_before"]
    assert (number["k"], number["scope"], number["selected_after"]) == (3, "all", 3 * number["scoped"])
    assert number["scoped"] > forced["scoped"], "the prompt is in scope of it, too"
    for line in row_lines(rows):
        assert line in said
    assert (
        f"layer 2 expert 0 forced out: {forbidden['scoped']} tokens in scope, selections {forbidden['selected_before']} before and 0 after"
        in said
    )


def test_what_never_fires_fails_when_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_file = tmp_path / "plan.json"
    assert main(["plan", "--out", str(plan_file), "--force-in", "2:3", "--scope", "after:500"]) == 0
    generate = ["generate", "--plan", str(plan_file), "--num", "2", "--max-new-tokens", "8", "--strict"]
    assert main([*generate, "--out", str(tmp_path / "run")]) == 1
    assert "nothing of the plan fired in the whole run" in capsys.readouterr().err


def test_choice_is_added_to_a_plan_and_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert main(["plan", "--out", str(first), "--preset", "rice-r1-math"]) == 0
    words = ["--force-in", "39:182", "--top-k", "3=4"]
    assert main(["plan", "--out", str(second), "--start", str(first), *words]) == 0
    plan = SteeringPlan.load(second)
    assert plan.experts == (ExpertGain(39, 182, 64.0, force="in"), ExpertGain(29, 126, 64.0))
    assert main(["plan", "--out", str(first), "--top-k", "3=4", "--scope", "answer"]) == 0
    assert SteeringPlan.load(first).top_k == (TopK(3, 4, "answer"),)
    text = json.loads(first.read_text())
    assert text["top_k"] == [{"layer": 3, "k": 4, "scope": "answer"}]
    assert text["experts"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--force-in", "3"], "--force-in '3' names no expert: write LAYER:EXPERT"),
        (["--force-in", "3:1", "--force-out", "3:1"], "that expert is forced in already"),
        (["--experts", "3:1=2", "--force-out", "3:1"], "is forced out and has a gain"),
        (["--logit-bias", "3:1"], "write LAYER:EXPERT=BIAS"),
        (["--logit-bias", "3:1=loud"], "the bias is not a number"),
        (["--logit-bias", "3:1=nan"], "give a finite number"),
        (["--logit-bias", "3:1=0"], "changes nothing"),
        (["--top-k", "3:4"], "write LAYER=K or LAYER=K@SCOPE"),
        (["--top-k", "3=0"], "give a whole number >= 1"),
        (["--top-k", "3=2@nowhere"], "nowhere"),
        (["--top-k", "3=2@all", "--scope", "thought"], "every --top-k names its own scope"),
        (["--force-in", "3:1", "--renormalize"], "no expert of the plan has one"),
        (["--force-in", "3:1", "--gain", "2"], "--gain is not read"),
    ],
)
def test_words_that_say_nothing_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--out", str(tmp_path / "p.json"), *words]) != 0
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "p.json").exists()
