"""Loops found, the expert that carries them found and silenced, and what that costs: on a lab with a planted loop."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graded_rows import row
from launch.cli.main import main
from launch.core.levers.looping import Answers, LoopText, choose_plan, fewer_loops, is_loop, silencing, weakest_odds
from moe_steer import load_model, steer
from reasoning_evals.comparing import wilson_interval


def test_a_model_without_loops_and_one_without_experts_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--num", "8", "--samples", "1", "--max-new-tokens", "48"]
    assert main(["unloop", "lab", *short, "--out", str(tmp_path / "a")]) == 1
    assert "0 of 4 problems end in a loop, and two are needed to look for a cause" in capsys.readouterr().err
    assert main(["unloop", "lab-dense", *short, "--out", str(tmp_path / "b")]) == 1
    assert "has no experts to silence: loops of dense models are not looked into" in capsys.readouterr().err
    assert not (tmp_path / "a" / "plan.json").exists()


def test_the_weakest_place_is_the_lowest_odds_of_a_phase() -> None:
    model, tokenizer = load_model("lab", "plain")
    ids = tokenizer("So it is 7. So it is 7. So it is 7. So it is 7. So", add_special_tokens=False)["input_ids"]
    period = len(tokenizer(" So it is 7.", add_special_tokens=False)["input_ids"])
    length = len(ids) - 2
    plan = silencing([(3, 5)])
    with torch.no_grad(), steer(model, plan, quiet=True):
        shares_SV = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    phases: dict[int, list[float]] = {}
    for number, place in enumerate(range(len(ids) - length + period - 1, len(ids) - 1)):
        share = shares_SV[place, ids[place + 1]]
        phases.setdefault(number % period, []).append(float(torch.log(share / (1 - share))))
    expected = min(sum(values) / len(values) for values in phases.values())
    loop = LoopText(token_ids=tuple(ids), period=period, length=length)
    assert weakest_odds(model, [loop, loop], plan) == pytest.approx(expected, abs=1e-4)


def test_the_share_of_loops_is_over_problems_not_over_answers() -> None:
    """4 of 10 problems loop in all of 4 answers: that is as sure as 10 answers make it, not 40."""
    loops = {("sampled", "baseline", str(n), k): n < 4 for n in range(10) for k in range(4)}
    found = Answers(folder=Path(), loops=loops, rows={}).share("baseline", "sampled")
    assert (found.number, found.of) == (16, 40)
    assert (found.low, found.high) == pytest.approx(wilson_interval(4, 10))
    greedy = {("greedy", "baseline", str(n), 0): n < 4 for n in range(10)}
    assert Answers(folder=Path(), loops=greedy, rows={}).share("baseline", "greedy")[2:] == pytest.approx(
        wilson_interval(4, 10)
    )
    unmoved = {("greedy", arm, str(n), 0): n < 4 for n in range(10) for arm in ("baseline", "unlooped")}
    same = Answers(folder=Path(), loops=unmoved, rows={}).difference("loops")
    assert (same["mean"], same["low"], same["high"]) == (0.0, None, None)
    assert same["loss_bound"] == pytest.approx(0.05 ** (1 / 10) - 1), "10 problems do not rule out one lost in four"
    assert not fewer_loops(same)
    none = Answers(folder=Path(), loops={}, rows={}).share("baseline", "greedy")
    assert none == (0, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("num", "ended", "shown"), [(10, 10, True), (4, 4, False), (10, 0, False), (10, 9, True), (10, 2, False)]
)
def test_an_end_of_loops_is_shown_also_where_every_problem_ends_its_loop(num: int, ended: int, shown: bool) -> None:
    """All moved alike has no interval, and the best plan of all ended in a traceback."""
    loops = {("greedy", "baseline", str(n), 0): True for n in range(num)}
    loops |= {("greedy", "unlooped", str(n), 0): n >= ended for n in range(num)}
    assert fewer_loops(Answers(folder=Path(), loops=loops, rows={}).difference("loops")) is shown


def test_loops_of_one_cluster_are_no_independent_ones() -> None:
    """Of 24 problems those of 2 clusters end their loops: as problems they are enough for a verdict, as clusters they are not."""
    names = [(str(n), f"c{n % 2}" if n < 8 else f"own {n}") for n in range(24)]
    loops = {
        ("greedy", arm, name, 0): arm == "baseline" or int(name) >= 8
        for name, _ in names
        for arm in ("baseline", "unlooped")
    }
    rows = [dataclasses.replace(row("baseline", name, 0, True), cluster_id=cluster) for name, cluster in names]
    alone, together = (Answers(folder=Path(), loops=loops, rows={"greedy": some}) for some in ([], rows))
    assert fewer_loops(alone.difference("loops"))
    assert not fewer_loops(together.difference("loops"))
    assert together.share("unlooped", "greedy").low < alone.share("unlooped", "greedy").low - 0.05


def test_a_plan_that_does_nothing_seldom_ends_loops() -> None:
    random, shown, runs = np.random.default_rng(0), 0, 120
    for _ in range(runs):
        rates = random.beta(0.8, 0.8, 12)
        loops = {
            ("greedy", arm, str(n), j): bool(random.random() < rates[n])
            for arm in ("baseline", "unlooped")
            for n in range(12)
            for j in range(3)
        }
        shown += fewer_loops(Answers(folder=Path(), loops=loops, rows={}).difference("loops"))
    assert shown / runs <= 0.025 + 2 * (0.025 * 0.975 / runs) ** 0.5


def test_fewest_loops_then_fewest_experts() -> None:
    plans = {"a": silencing([(1, 1)]), "a+b": silencing([(1, 1), (1, 2)]), "c": silencing([(1, 3)])}
    left = {"baseline": 3, "a": 1, "a+b": 1, "c": 2}

    def answers(numbers: dict[str, int]) -> Any:
        loops = {("greedy", name, str(n), 0): n < number for name, number in numbers.items() for n in range(4)}
        return Answers(folder=Path(), loops=loops, rows={})

    assert choose_plan(answers(left), plans) == ("a", left)
    assert choose_plan(answers(dict.fromkeys(left, 3)), plans)[0] is None
    assert is_loop([9, *[5, 6, 7] * 12], "length")
    assert not is_loop([9, *[5, 6, 7] * 12], "stop"), "an answer that ends is none"
    assert not is_loop(list(range(60)), "length")
