"""The same samples at lower token limits: what a cut sample is, and where a gain sits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from graded_rows import row, simulated
from launch.cli.main import main
from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.comparing.comparison import Comparison
from reasoning_evals.comparing.read_again import at_caps, cap_lines, cut_rows, finished
from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.runs.grading_pass import GradeRow
from reasoning_evals.runs.run import run_arms
from scripted_sampler import arms, problems


def one(**changes: object) -> GradeRow:
    """A right answer: 40 tokens of thought, two tags, 8 tokens of answer, the stop token."""
    made = row("x", "p", 0, True, tokens=50)
    return dataclasses.replace(made, thinking_tokens=39, answer_tokens=8, total_tokens=50, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cap", "outcome", "state", "thinking", "answer"),
    [
        (50, "correct", "closed", 39, 8),
        (49, "cut", "closed", 39, 8),  # the stop token is missing: nobody knows that the answer ends here
        (42, "cut", "closed", 39, 1),
        (41, "truncated", "truncated", 39, 0),  # the thought and its tags take 41
        (10, "truncated", "truncated", 10, 0),
    ],
)
def test_what_a_cut_sample_is(cap: int, outcome: str, state: str, thinking: int, answer: int) -> None:
    found = cut_rows([one()], cap)[0]
    assert (found.outcome, found.state) == (outcome, state)
    assert (found.thinking_tokens, found.answer_tokens, found.total_tokens) == (thinking, answer, min(cap, 50))
    assert found.correct == (cap >= 50), "a thought that is cut is never right"
    assert finished(found) == (cap >= 50)
    assert found.finish_reason == ("stop" if cap >= 50 else "length")


def test_without_counts_of_the_thought_the_total_decides() -> None:
    plain = one(state="none")
    assert cut_rows([plain], 20)[0].outcome == "cut"
    unknown = dataclasses.replace(one(), thinking_tokens=None, answer_tokens=None)
    assert (cut_rows([unknown], 20)[0].outcome, cut_rows([unknown], 20)[0].thinking_tokens) == ("truncated", None)


def test_a_cap_above_a_sample_that_was_cut_is_refused() -> None:
    cut = one(finish_reason="length", outcome="truncated", state="truncated")
    assert cut_rows([cut], 50) == [cut]
    with pytest.raises(
        ValueError, match=r"cap 51 cannot be read: 1 of 1 samples were cut before it .* at 50\); leave it out"
    ):
        cut_rows([cut], 51)
    with pytest.raises(ValueError, match="a cap must be 1 token or more, got 0"):
        cut_rows([cut], 0)


@pytest.mark.parametrize("seed", [1, 6, 8])
def test_a_better_arm_that_finishes_as_often_gains_nothing_in_finishing(seed: int) -> None:
    """It is also right more often among the samples that it alone finished: that is no gain in finishing."""
    (found,) = at_caps(made(1.0, 0.25, seed), [600])
    assert (found.verdict, "finishing" in found.where) == ("helped", False)


def made(shorter: float, better: float, seed: int = 0) -> list[GradeRow]:
    """80 problems x 4: arm b takes a share ``shorter`` of the baseline's tokens, and is right so much more often."""
    dice = np.random.default_rng(seed)
    rates = dice.beta(3, 3, 80)
    rows = []
    for arm, factor, more in (("baseline", 1.0, 0.0), ("b", shorter, better)):
        for i, rate in enumerate(rates):
            for j in range(4):
                tokens = int(factor * dice.lognormal(6.5, 0.5)) + 30
                rows.append(row(arm, f"p{i}", j, bool(dice.random() < min(1, rate + more)), tokens))
    return rows


def test_a_shorter_arm_gains_in_finishing_and_not_at_a_high_limit() -> None:
    found = at_caps(made(0.6, 0.0), [600, 100_000])
    low, high = found
    assert (low.verdict, low.where, high.verdict, high.where) == ("helped", "finishing", "no effect shown", "")
    assert low.finished_b > low.finished_a + 0.2
    assert high.finished_a == high.finished_b == 1
    assert high.by_finishing.mean == 0
    assert cap_lines(found)[-1] == (
        "b against baseline: the gain is one in finishing (at 600 tokens); at 100,000 none is shown."
    )
    assert ": a gain in finishing." in low.sentence


def test_a_gain_at_one_limit_and_a_loss_at_another_are_not_called_a_gain() -> None:
    """b answers half of the problems early and never comes to an end of the others."""
    rows = []
    for number in range(40):
        early = number % 2 == 0
        rows.append(dataclasses.replace(row("baseline", f"{number}", 0, True, tokens=1000), thinking_tokens=990))
        b = row("b", f"{number}", 0, early, tokens=100 if early else 9000)
        rows.append(
            dataclasses.replace(
                b, outcome="correct" if early else "truncated", finish_reason="stop" if early else "length"
            )
        )
    found = at_caps(rows, [300, 5000])
    assert [(one.verdict, one.where) for one in found] == [("helped", "finishing"), ("hurt", "finishing")]
    assert cap_lines(found) == [one.sentence for one in found]


def test_a_better_arm_gains_in_right_answers_at_every_limit() -> None:
    found = at_caps(made(1.0, 0.3), [2000, 100_000])
    assert [one.where for one in found] == ["right answers among those finished"] * 2
    assert len(cap_lines(found)) == 2, "no line says that the gain is one in finishing"


@pytest.mark.parametrize("cap", [300, 700, 5000])
def test_the_parts_add_up_and_equal_a_plain_count(cap: int) -> None:
    rows = made(0.7, 0.1, seed=3)
    found = at_caps(rows, [cap])[0]
    by_key = {(r.arm, r.problem_id, r.sample_idx): r for r in rows}
    finishing = right = 0
    for (arm, name, j), a in by_key.items():
        if arm == "baseline":
            b = by_key["b", name, j]
            a_in, b_in = a.total_tokens <= cap, b.total_tokens <= cap
            right += (b.correct - a.correct) if a_in and b_in else 0
            finishing += (b.correct and b_in and not a_in) - (a.correct and a_in and not b_in)
    assert found.by_finishing.mean == pytest.approx(finishing / 320)
    assert found.by_being_right.mean == pytest.approx(right / 320)
    assert found.accuracy.mean == pytest.approx((finishing + right) / 320)


def test_a_cap_above_all_samples_is_the_comparison_itself() -> None:
    rows = simulated(30, 2, {"baseline": 0.0, "x": 0.1, "placebo": 0.0})
    found, whole = at_caps(rows, [10_000]), compare_arms(rows)
    assert [(one.a, one.b) for one in found] == [(pair.a, pair.b) for pair in whole.pairs]
    for ours, pair in zip(found, whole.pairs, strict=True):
        assert (ours.accuracy.mean, ours.p_value, ours.holm_p) == (pair.accuracy.mean, pair.p_value, pair.holm_p)


def test_verdicts_are_adjusted_for_all_caps() -> None:
    rows = made(0.75, 0.0, seed=1)
    alone, among = at_caps(rows, [600])[0], at_caps(rows, [500, 550, 600, 100_000])[2]
    assert alone.p_value == among.p_value == alone.holm_p <= among.holm_p
    assert "after Holm over 4 pairs and caps" in among.sentence


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "run", tmp_path / "out.json"
    run_arms(arms(), problems(12), folder, 2, SamplingConfig(), seed=7, task="demo")
    assert main(["compare", "--baseline", str(folder), "--caps", "1", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "The same samples, cut at each limit" in shown
    assert "steered against baseline at 3 tokens: " in shown
    values = json.loads(out.read_text())
    assert [one["cap"] for one in values["caps"]] == [1, 3]
    assert Comparison.from_dict(values).baseline == "baseline"
    assert main(["compare", "--baseline", str(folder), "--caps", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(folder), "--caps", "3"]) == 0
    page = (folder / "report.md").read_text()
    assert "## The same samples, cut at each limit" in page
    assert "steered against baseline at 3 tokens: " in page
